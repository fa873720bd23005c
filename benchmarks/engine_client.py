"""The other end of `engine_worker`: starts an engine in a process of its own and asks it things.

Also what is seen only from outside: how long it takes from the start of the process to the first
token, and the most memory it ever had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import ROOT
from benchmarks.timing import SampleFailure
from jamba_lm.tensor_file import TensorFile

FIRST_PROMPT = 16


class EngineFailure(SampleFailure):
    """A process that was to be measured ended; its own output says why."""


@dataclass(slots=True)
class Worker:
    """A running engine."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, deed: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            EngineFailure: the process ended instead.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": deed, **arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailure(f"{self.name} ended before it was asked to {deed}") from error
        line = stdout.readline()
        if not line:
            raise EngineFailure(f"{self.name} ended when it was asked to {deed}")
        return json.loads(line)

    def seconds(self, deed: str, **arguments: Any) -> float:
        """Return the seconds that a deed took by the worker's own clock."""
        return float(self.ask(deed, **arguments)["seconds"])

    def logits(self, ids: Sequence[int], folder: Path) -> Tensor:
        """Return the logits after each of the tokens, [T, V]."""
        out = folder / f"{self.name}.safetensors"
        self.ask("logits", ids=list(ids), out=str(out))
        with TensorFile(out) as tensors:
            return tensors.tensor("logits").clone()


@contextmanager
def worker(engine: str, folder: Path, weights: str, threads: int) -> Iterator[Worker]:
    """Run an engine for as long as the block lasts."""
    arguments = [engine, str(folder), weights, str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine_worker", *arguments],
        cwd=ROOT,
        env=environment(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Worker(f"{engine}-{weights}", process)
    finally:
        # Closes its stdin, which ends it.
        process.communicate()


def environment(threads: int) -> dict[str, str]:
    """Return the environment of an engine: this one's, with the number of threads set."""
    paths = [str(ROOT / "src"), str(ROOT)]
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
    }


def native_start(folder: Path, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Read and write in a process as `jamba generate` is one, and return what it says.

    Raises:
        EngineFailure: it failed.
    """
    options = [f"--threads={threads}", f"--prompt-tokens={prompt_tokens}"]
    command = [sys.executable, "-m", "benchmarks.native_start", str(folder), *options]
    command.append(f"--new-tokens={new_tokens}")
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads), capture_output=True, text=True
    )
    if done.returncode:
        raise EngineFailure(f"benchmarks.native_start: {done.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def first_token_seconds(engine: str, folder: Path, weights: str, threads: int) -> float:
    """Return the seconds from the start of a process to the first token of a short prompt."""
    started = time.perf_counter()
    if engine == "jamba":
        native_start(folder, threads, FIRST_PROMPT, 1)
        return time.perf_counter() - started
    with worker(engine, folder, weights, threads) as running:
        running.ask("greedy", ids=list(range(2, 2 + FIRST_PROMPT)), tokens=1)
        return time.perf_counter() - started


def peak_bytes(engine: str, folder: Path, weights: str, threads: int, tokens: int) -> int:
    """Return the most memory that a process has which reads a prompt and writes 16 tokens."""
    if engine == "jamba":
        return int(native_start(folder, threads, tokens, 16)["peak_bytes"])
    with worker(engine, folder, weights, threads) as running:
        running.ask("prefill", tokens=tokens, batch=1)
        running.ask("decode", prompt=1, tokens=16, batch=1)
        return int(running.ask("memory")["peak_bytes"])


def some_ids(vocab_size: int, tokens: int) -> list[int]:
    """Return a prompt for the comparison of logits."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab_size, (tokens,), generator=draw).tolist()
