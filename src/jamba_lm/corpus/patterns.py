"""Files by patterns such as `texts/**/*.jsonl`, in one order on every machine.

Knows nothing of what is in them.
"""

from __future__ import annotations

import glob
from pathlib import Path

from jamba_lm.files import path_kind


def absolute_pattern(folder: Path, pattern: str) -> str:
    """Return a pattern relative to `folder` as one that is relative to nothing.

    >>> absolute_pattern(Path("/data[1]"), "*.txt")
    '/data[[]1]/*.txt'
    """
    if Path(pattern).is_absolute():
        return pattern
    return str(Path(glob.escape(str(folder.absolute()))) / pattern)


def matching_files(pattern: str) -> list[Path]:
    """List the files that a pattern names, sorted; hidden ones only if it says so.

    A pattern that is the very name of a file names that file.
    """
    if path_kind(pattern) == "file":
        return [Path(pattern)]
    # Path.glob takes no absolute patterns, and finds hidden files.
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207
    return sorted(Path(path) for path in set(found) if path_kind(path) == "file")
