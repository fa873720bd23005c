"""How tests start the command as a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"

# A shell that starts a job in the background makes it deaf to Ctrl-C, and children inherit that.
PROGRAM = [
    sys.executable,
    "-c",
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from jamba_lm.cli.main import main\n"
    "sys.exit(main())",
]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "JAMBA_BACKEND"},
    "PYTHONPATH": str(SOURCE),
    "PYTHONIOENCODING": "utf-8",
    "OMP_NUM_THREADS": "1",
}
