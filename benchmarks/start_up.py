"""How long commands take from the start of the process to its end, and how much memory.

    python -m benchmarks.start_up [--shape mid] [--type bf16] [--repeats 9] [--json]

Each command is run as a user runs it; medians of wall-clock and of processor time are printed,
beside those of a Python that does nothing and of one that imports torch. With --shape, a model of
that shape reads a prompt of sixteen tokens and writes one, its file in the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jamba_lm.presets import embedded_model_path

COMMANDS: dict[str, list[str]] = {
    "python -c pass": ["python", "-c", "pass"],
    "jamba --help": ["jamba", "--help"],
    "jamba inspect jamba-v0.1": ["jamba", "inspect", "jamba-v0.1"],
    "jamba plan jamba-v0.1 --context 256K --weights int8": [
        *("jamba", "plan", "jamba-v0.1"),
        *("--context", "256K", "--batch", "1", "--weights", "int8", "--memory", "80GiB"),
    ],
}
IMPORT_TORCH = {'python -c "import torch"': ["python", "-c", "import torch"]}
# Sixteen tokens of the tokenizer of the embedded model, with the one that begins a text.
PROMPT = "one two three four five six seven eight nine ten eleven twelve."


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took.

    Attributes:
        wall_seconds: by the clock on the wall.
        processor_seconds: of all its threads.
        peak_bytes: the most memory that was resident, pages of mapped files included.
    """

    wall_seconds: float
    processor_seconds: float
    peak_bytes: int


# A process that is born has its parent's memory until it becomes another program, and is charged
# for it: so the parent is a Python that has imported next to nothing.
MEASURE = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
said = process.stderr.read().decode(errors="replace")
_, status, used = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
if status:
    sys.exit(said)
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


def run_once(arguments: list[str]) -> Run:
    """Run a command of this environment."""
    program = str(Path(sys.executable).with_name(arguments[0]))
    command = [sys.executable, "-S", "-c", MEASURE, program, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(arguments)}: {done.stderr}")
    return Run(*json.loads(done.stdout))


@contextmanager
def with_tokenizer(folder: Path) -> Iterator[Path]:
    """Lend a folder with these weights and the tokenizer of the embedded model."""
    with TemporaryDirectory() as name:
        for path in folder.iterdir():
            (Path(name) / path.name).symlink_to(path.resolve())
        for path in embedded_model_path().glob("tokenizer*.json"):
            shutil.copy(path, name)
        yield Path(name)


def measure(commands: dict[str, list[str]], repeats: int) -> list[dict[str, object]]:
    """Run each command in turn, so that a machine that changes its speed does so for all."""
    for arguments in commands.values():
        run_once(arguments)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, arguments in commands.items():
            runs[name].append(run_once(arguments))
    return [
        {
            "command": name,
            "wall_seconds": statistics.median(run.wall_seconds for run in taken),
            "processor_seconds": statistics.median(run.processor_seconds for run in taken),
            "peak_bytes": max(run.peak_bytes for run in taken),
        }
        for name, taken in runs.items()
    ]


def first_token(shape: str, weights: str, cache: Path, repeats: int) -> list[dict[str, object]]:
    """Measure the way to the first token of a shape, and Python and torch alone."""
    from benchmarks.checkpoints import checkpoint
    from benchmarks.our_model import packed_folder

    stored = packed_folder(checkpoint(shape, cache), weights)
    num_bytes = sum(path.stat().st_size for path in stored.glob("*.safetensors"))
    with with_tokenizer(stored) as folder:
        generate = ["jamba", "generate", str(folder), "--prompt", PROMPT]
        generate += ["--max-tokens", "1", "--temperature", "0"]
        commands = {
            "python -c pass": COMMANDS["python -c pass"],
            **IMPORT_TORCH,
            f"first token of {shape}, {weights}": generate,
        }
        rows = measure(commands, repeats)
    rows[-1]["checkpoint_bytes"] = num_bytes
    return rows


def main() -> None:
    """Print a table, or one JSON object."""
    from benchmarks.checkpoints import SHAPES
    from benchmarks.comparison_run import TYPES
    from benchmarks.llama_cpp import cache_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="runs of each command")
    parser.add_argument("--shape", choices=SHAPES, help="measure the way to its first token")
    parser.add_argument("--type", choices=TYPES, default="bf16", dest="weights")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.shape is None:
        rows = measure(COMMANDS, options.repeats)
    else:
        rows = first_token(options.shape, options.weights, options.cache, options.repeats)
    if options.json:
        print(json.dumps({"repeats": options.repeats, "rows": rows}, indent=2))
        return
    print("| command | wall clock | processor | peak memory |")
    print("| --- | ---: | ---: | ---: |")
    for row in rows:
        wall, used = float(str(row["wall_seconds"])), float(str(row["processor_seconds"]))
        peak = int(str(row["peak_bytes"])) / 2**20
        print(f"| `{row['command']}` | {wall:.2f} s | {used:.2f} s | {peak:,.0f} MiB |")
    if options.shape is not None:
        print(f"\nThe checkpoint has {int(str(rows[-1]['checkpoint_bytes'])) / 2**20:,.0f} MiB.")


if __name__ == "__main__":
    main()
