"""How long the commands that answer at once take, from start to exit of the process.

    python -m benchmarks.start_up [--repeats 9] [--json]

Each command is run as a user runs it; medians of wall-clock and of processor time are printed,
beside those of a Python that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS: dict[str, list[str]] = {
    "python -c pass": ["python", "-c", "pass"],
    "jamba --help": ["jamba", "--help"],
    "jamba inspect jamba-v0.1": ["jamba", "inspect", "jamba-v0.1"],
    "jamba plan jamba-v0.1 --context 256K --weights int8": [
        *("jamba", "plan", "jamba-v0.1"),
        *("--context", "256K", "--batch", "1", "--weights", "int8", "--memory", "80GiB"),
    ],
}


def run_once(arguments: list[str]) -> tuple[float, float]:
    """Run a command of this environment and return its wall-clock and processor seconds."""
    program = Path(sys.executable).with_name(arguments[0])
    before, started = os.times(), time.perf_counter()
    subprocess.run([program, *arguments[1:]], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    used = after.children_user - before.children_user + after.children_system
    return wall, used - before.children_system


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="runs of each command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    for name, arguments in COMMANDS.items():
        run_once(arguments)
        runs = [run_once(arguments) for _ in range(options.repeats)]
        wall, used = (statistics.median(times) for times in zip(*runs, strict=True))
        rows.append({"command": name, "wall_seconds": wall, "processor_seconds": used})
    if options.json:
        print(json.dumps({"repeats": options.repeats, "rows": rows}, indent=2))
        return
    print("| command | wall clock | processor |")
    print("| --- | ---: | ---: |")
    for row in rows:
        wall, used = float(row["wall_seconds"]), float(row["processor_seconds"])
        print(f"| `{row['command']}` | {wall:.2f} s | {used:.2f} s |")


if __name__ == "__main__":
    main()
