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

import jamba_lm
from jamba_lm.analysis.processor import this_processor

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(jamba_lm.__file__).resolve().parent


def require_same_checkout(package: Path = PACKAGE, root: Path = ROOT) -> None:
    """End the program when it would measure another checkout than the one whose commit it tells.

    An editable install is found before `PYTHONPATH`, and a clone has the benchmarks of its own.
    """
    if not package.is_relative_to(root):
        sys.exit(
            f"error: the programs of {root} would measure the package in {package}; "
            "make setup there, and use its .venv"
        )


def require_green(*tests: str) -> None:
    """Run tests, and end the program when one fails: a wrong result has no speed."""
    require_same_checkout()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit("error: the tests of what is to be measured fail; nothing was measured")


def hardware() -> dict[str, Any]:
    """Describe the machine and the software, for the record."""
    require_same_checkout()
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
