"""What every timing has in common: a green gate first, a calibrated machine, medians, JSON.

A result is only as good as the machine was quiet. The rate of a loop of multiply-adds that never
touches memory is taken before and after; when the two differ, or a single one was disturbed, the
run is called contaminated and reported as that.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

# Calibrations that differ by more than this share were not taken on the same, quiet machine.
STEADY = 0.05

FMA_SOURCE = Path(__file__).with_name("fma_loop.cpp")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one action, repeated."""

    median: float
    best: float
    worst: float

    @classmethod
    def of(cls, action: Callable[[], object], repeats: int, warm_up: int = 2) -> Timing:
        """Time `action`, after runs that do not count."""
        for _ in range(warm_up):
            action()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - started)
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def require_green(*tests: str) -> None:
    """Run tests, and end the program when one fails: a wrong result has no speed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit("error: the tests of what is to be measured fail; nothing was measured")


def fma_nanoseconds(repeats: int = 9) -> float:
    """Return the time of one multiply-add of the widest vectors, one thread, best of several.

    The loop has more independent chains than the latency asks for, so this is the throughput that
    bounds every kernel. It is compiled for this machine each time.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        sys.exit("error: a C++ compiler is needed to measure what the machine can do")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "fma")
        command = [compiler, "-O2", "-march=native", str(FMA_SOURCE), "-o", str(program)]
        subprocess.run(command, check=True)
        runs = [
            float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
            for _ in range(repeats)
        ]
    return min(runs)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The multiply-add rate before and after a measurement."""

    before: float
    after: float

    @property
    def steady(self) -> bool:
        """Say whether the machine was the same at both ends."""
        return abs(self.before - self.after) <= STEADY * min(self.before, self.after)


def hardware() -> dict[str, Any]:
    """Describe the machine and the software, for the record."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    git = shutil.which("git")
    commit = "unknown"
    if git is not None:
        shown = subprocess.run(
            [git, "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = shown.stdout.strip() or commit
    return {
        "processor": model,
        "cores": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` as JSON, when a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def timing_record(timing: Timing) -> dict[str, float]:
    """Return the numbers of a timing for JSON, in seconds."""
    return asdict(timing)
