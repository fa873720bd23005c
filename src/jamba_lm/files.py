"""Whole files, written all at once or not at all, and JSON read with suspicion.

Knows nothing about models: a caller says what it is reading, and which error a bad file is.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jamba_lm.errors import InputError, JambaError

MIB = 1024**2


_SUFFIX = ".tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_atomic` whose writers were killed.

    Nobody else may be writing to `folder`.
    """
    for stray in folder.glob(f".*.{'[0-9a-f]' * 16}{_SUFFIX}"):
        stray.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Create or replace the file at `path`, so that no reader and no crash ever sees half of it.

    The bytes go into a temporary file in the same folder, which takes the final name only after
    they have reached the disk. When anything fails, the old file is untouched and the temporary
    one is gone. A symbolic link keeps pointing where it did: its target is replaced.

    Args:
        path: the file to write; its folder must exist.
        write: called once with the open temporary file.

    Raises:
        InputError: the operating system refused (no such folder, no permission, disk full).
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{os.urandom(8).hex()}{_SUFFIX}")
    try:
        try:
            # "x" and not a temporary-file module: the file gets the permissions that an ordinary
            # new file has under the user's umask.
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; "
            "check the folder, its permissions and the free space"
        ) from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make the folder at `path` and those above it, unless they are there.

    Raises:
        InputError: the operating system refused, or a file has that name.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {str(path)!r}: {error.strerror or error}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the new name in `folder` survive a power cut."""
    # Windows cannot open a folder; there the rename is as durable as it gets.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(
    path: str | os.PathLike[str],
    what: str,
    error: type[JambaError],
    limit_bytes: int = 64 * MIB,
) -> dict[str, Any]:
    """Read one JSON object from a file that nobody vouches for.

    Stricter than the standard parser, because what it lets through changes models: a key given
    twice, NaN and Infinity, numbers too large for a float and a file over `limit_bytes` are all
    refused.

    Args:
        path: the file.
        what: what the file should be, for the message: "model configuration".
        error: which error a bad file is.
        limit_bytes: refuse a longer file, before reading it.

    Raises:
        error: the file is missing, unreadable, too long, not UTF-8 or not one JSON object.
    """
    return parse_json(
        _read_bytes(Path(path), what, error, limit_bytes), f"{what} {str(path)!r}", error
    )


def path_kind(path: str | os.PathLike[str]) -> Literal["file", "folder", "other", "missing"]:
    """Say what lies at `path`; a path that cannot exist (too long, say) is missing, not an error.

    "other" is a pipe, a device or a socket, which reading could wait on for ever.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return "missing"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def _read_bytes(path: Path, what: str, error: type[JambaError], limit_bytes: int) -> bytes:
    if path_kind(path) != "file":
        raise error(f"no {what} at {str(path)!r}: expected a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as cause:
        raise error(f"cannot read {what} {str(path)!r}: {cause.strerror or cause}") from cause
    if len(data) > limit_bytes:
        raise error(
            f"{what} {str(path)!r} is longer than {limit_bytes:,} bytes: is it the right file?"
        )
    return data


def parse_json(data: bytes, what: str, error: type[JambaError]) -> dict[str, Any]:
    """Parse one JSON object, as strictly as `read_json` does.

    Raises:
        error: `data` is not UTF-8 or not one well-formed JSON object.
    """

    def reject(reason: str) -> JambaError:
        return error(f"{what} is not usable JSON: {reason}")

    def constant(name: str) -> Any:
        raise reject(f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise reject(f"the number {text[:20]} does not fit a float")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise reject(f"the key {key[:80]!r} is given twice")
                seen.add(key)
        return values

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=constant,
            parse_float=number,
            object_pairs_hook=unique,
        )
    except UnicodeDecodeError as cause:
        raise reject(f"byte {cause.start} is not UTF-8") from cause
    except RecursionError as cause:
        raise reject("it is nested too deeply") from cause
    except json.JSONDecodeError as cause:
        raise reject(f"{cause.msg} (line {cause.lineno}, column {cause.colno})") from cause
    except ValueError as cause:
        # Python refuses to convert integers of thousands of digits.
        raise reject("it holds an integer of thousands of digits") from cause
    if not isinstance(value, dict):
        raise reject(f"expected an object, found {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically, with a final newline.

    Raises:
        InputError: the operating system refused.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda file: _write(file, text.encode("utf-8")))


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
