"""What the person who started the program has chosen, other than by options. Needs no torch."""

from __future__ import annotations

import os


def requested_backend() -> str | None:
    """Return the back-end that the environment variable JAMBA_BACKEND names, if any."""
    return os.environ.get("JAMBA_BACKEND") or None
