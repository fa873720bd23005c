"""How long `jamba init` takes for a preset, and how much memory.

    python -m benchmarks.random_checkpoint [PRESET] [--json]

The checkpoint is written below the folder for temporary files (TMPDIR) and deleted again; the 3B
preset needs 6.1 GB there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from jamba_lm.analysis.machine import peak_memory
from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.presets import preset

GIB = 1024**3


def main() -> None:
    """Print one line, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", nargs="?", default="3b", help="which shape (default: 3b)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started, cpu_started = time.monotonic(), time.process_time()
        written = write_random_checkpoint(Path(folder, "x"), preset(arguments.preset))
        seconds = time.monotonic() - started
        cpu_seconds = time.process_time() - cpu_started
    peak = peak_memory()
    if arguments.json:
        result = {
            "preset": arguments.preset,
            "bytes": written,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": peak,
        }
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{arguments.preset}: {written:,} bytes of bf16 weights in {seconds:.1f} s "
            f"({cpu_seconds:.1f} s of CPU time), peak memory {peak / GIB:.2f} GiB"
        )


if __name__ == "__main__":
    main()
