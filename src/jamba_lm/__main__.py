"""`python -m jamba_lm`: the command `jamba`, as torchrun and other launchers start it."""

from __future__ import annotations

import sys

from jamba_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
