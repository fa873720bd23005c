"""Memory that was freed stays with the process, for the program that trains and does nothing else.

Knows the C library's allocator, and nothing of training. Every step frees what the next one asks
for again. By default glibc gives each large block back to the kernel at once, and the kernel then
clears every page anew: a tenth to a half of a step. The policy is that of a whole process, so only
an entry point may choose it.
"""

from __future__ import annotations

import ctypes

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h, and what they are set to. M_MMAP_MAX is
# left alone: without any mmap, two threads that train took four times as long.
_SETTINGS = ((-1, 2**31 - 1), (-3, 2**31 - 1))


def keep_freed_pages() -> bool:
    """Tell the allocator to keep what is freed.

    Returns:
        Whether it understood: False with a C library other than glibc, where nothing changes.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, value) == 1 for name, value in _SETTINGS)
