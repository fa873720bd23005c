"""Reads the text that a tokenizer is trained and measured on, piece by piece.

A piece is a whole document of a .jsonl file, or about 16 KiB of a text file, cut where a line
ends. Knows nothing about tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from jamba_lm.errors import DataError
from jamba_lm.files import MIB, parse_json, path_kind

PIECE_BYTES = 16 * 1024
# A longer line of a text file is cut at a space; a longer line of a .jsonl file is refused.
TEXT_LINE_BYTES = MIB
JSON_LINE_BYTES = 64 * MIB


def read_pieces(path: Path, *, field: str = "text") -> Iterator[tuple[str, int]]:
    """Yield the text of one file in pieces, each with the bytes of the file read so far.

    Args:
        path: a .jsonl file (one JSON object a line, its text under `field`) or a UTF-8 text file.
        field: the key of the text in a .jsonl file.

    Raises:
        DataError: the file is missing, empty, binary or not UTF-8, or a line of a .jsonl file is
            not an object with a text; the message names the file and the place.
    """
    if path_kind(path) != "file":
        raise DataError(f"no text at {str(path)!r}: expected a UTF-8 text file or a .jsonl file")
    read = _read_json_lines if path.suffix == ".jsonl" else _read_text
    empty = True
    try:
        with path.open("rb") as file:
            for text, done_bytes in read(file, path, field):
                empty = empty and not text
                yield text, done_bytes
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{str(path)!r} holds no text: give a file with some, or leave it out")


def total_bytes(paths: Sequence[Path]) -> int:
    """Add up the sizes of the files that exist, for a progress line."""
    return sum(path.stat().st_size for path in paths if path_kind(path) == "file")


def _read_text(file: BinaryIO, path: Path, field: str) -> Iterator[tuple[str, int]]:
    del field  # a text file is all text
    offset, rest = 0, b""
    while block := file.read(PIECE_BYTES):
        data = rest + block
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) >= TEXT_LINE_BYTES:
            cut = max(data.rfind(b" "), 0) or _last_character(data)
        yield from _piece(data[:cut], path, offset)
        offset, rest = offset + cut, data[cut:]
    yield from _piece(rest, path, offset)


def _last_character(data: bytes) -> int:
    """Return where the last character starts: it may go on in the next block."""
    for back in range(1, 4):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _piece(data: bytes, path: Path, offset: int) -> Iterator[tuple[str, int]]:
    if not data:
        return
    zero = data.find(0)
    if zero >= 0:
        raise DataError(
            f"{str(path)!r} is not text: byte {offset + zero:,} is zero; give UTF-8 text files"
        )
    try:
        yield data.decode("utf-8"), offset + len(data)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte {offset + error.start:,} is "
            f"0x{data[error.start]:02x} ({error.reason}); convert it, for example with iconv"
        ) from error


def _read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[tuple[str, int]]:
    offset, number = 0, 0
    while line := file.readline(JSON_LINE_BYTES):
        number += 1
        where = f"line {number:,} of {str(path)!r} (byte {offset:,})"
        offset += len(line)
        if len(line) == JSON_LINE_BYTES and not line.endswith(b"\n"):
            raise DataError(f"{where} is longer than {JSON_LINE_BYTES:,} bytes: split the document")
        if not line.strip():
            continue
        text = parse_json(line, where, DataError).get(field)
        if not isinstance(text, str):
            found = "none" if text is None else f"a {type(text).__name__}"
            raise DataError(f"{where}: expected a text under {field!r}, found {found}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: character {error.start:,} of the text is half a surrogate pair (U+"
                f"{ord(text[error.start]):04X}), which is no character; remove it"
            ) from error
        yield text, offset
