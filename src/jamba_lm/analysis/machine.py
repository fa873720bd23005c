"""How much memory this machine has, or this container is allowed. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from jamba_lm.errors import InputError

# The two generations of control groups say the limit of a container in different files; "max" and
# numbers beyond the physical memory mean no limit.
_LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def usable_memory(limit_files: tuple[Path, ...] = _LIMIT_FILES) -> int:
    """Return the bytes of memory that a process here can hope for: the machine's, or its limit.

    Args:
        limit_files: where a container's limit may be written.

    Raises:
        InputError: the operating system does not say.
    """
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise InputError(
            "this operating system does not say how much memory there is; name it: --memory 16GiB"
        ) from error
    limits = [_limit(path) for path in limit_files]
    return min([physical, *(limit for limit in limits if limit is not None)])


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        # No such file is the common case: no control groups, or the other generation.
        return None
    return int(text) if text.isdecimal() else None
