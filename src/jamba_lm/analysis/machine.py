"""How much memory this machine or container has, and how much a process took. Needs no torch."""

from __future__ import annotations

import os
import sys
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


def peak_memory(status: Path = Path("/proc/self/status")) -> int:
    """Return the most memory that this process has had at a time, in bytes.

    Args:
        status: where Linux says it. getrusage's maximum begins with that of the process that
            started this one, so it is asked only where there is no such file.
    """
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        peaks = [line for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0].split()[1]) * 1024
    import resource  # exists on Unix only, and planning should work everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        # No such file is the common case: no control groups, or the other generation.
        return None
    return int(text) if text.isdecimal() else None
