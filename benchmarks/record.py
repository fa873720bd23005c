"""What every result is published with: a green gate, the machine it was taken on, and JSON.

Knows no timing.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from jamba_lm.analysis.processor import this_processor

ROOT = Path(__file__).resolve().parent.parent


def require_green(*tests: str) -> None:
    """Run tests, and end the program when one fails: a wrong result has no speed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit("error: the tests of what is to be measured fail; nothing was measured")


def hardware() -> dict[str, Any]:
    """Describe the machine and the software, for the record."""
    processor = this_processor()
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
        "processor": processor.name,
        "features": list(processor.features),
        "cores": processor.cores,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit,
    }


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` as JSON, when a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
