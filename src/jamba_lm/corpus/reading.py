"""Documents out of files: plain text, a JSON object a line, or Parquet, compressed or not.

What cannot be used is said and counted, never skipped in silence. Knows no stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jamba_lm.corpus.compressed import BrokenFile, lines, open_plain, plain_name
from jamba_lm.corpus.document import Document, Unusable
from jamba_lm.corpus.recipe import DocumentsSection, Source
from jamba_lm.errors import DataError

Record = Document | Unusable
PARQUET_ROWS = 256


def format_of(source: Source, path: Path) -> str:
    """Return "text", "jsonl" or "parquet": what the source says, or the file's name."""
    if source.format != "auto":
        return source.format
    name = plain_name(path)
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def read_file(path: Path, source: Source, limits: DocumentsSection) -> Iterator[Record]:
    """Yield everything in a file that is a document or should have been one.

    Raises:
        DataError: the system cannot read the file.
        BackendUnavailable: the package for this kind of file is missing.
    """
    kind = format_of(source, path)
    position = 0
    try:
        if kind == "parquet":
            rows = _read_parquet(path, source, limits)
        elif kind == "jsonl":
            rows = _read_json_lines(path, source, limits)
        else:
            rows = _read_text(path, source, limits)
        for record in rows:
            position += 1
            yield record
    except BrokenFile as cause:
        where = f"{path.name}, after {position:,} documents"
        yield Unusable("broken file", where, str(cause), 0)
    except OSError as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause


def check_text(
    text: str, position: int, place: str, limits: DocumentsSection
) -> Document | Unusable:
    """Return a document, or why there is none."""
    num_bytes = len(text)
    if not text.strip():
        return Unusable("empty", place, "nothing but white space", num_bytes)
    if "\0" in text:
        return Unusable("binary", place, f"character {text.index(chr(0)):,} is null", num_bytes)
    if len(text) < limits.minimum_characters:
        detail = f"{len(text):,} characters, fewer than {limits.minimum_characters:,}"
        return Unusable("too short", place, detail, num_bytes)
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as cause:
        detail = f"character {cause.start:,} is half a surrogate pair"
        return Unusable("lone surrogate", place, detail, num_bytes)
    if num_bytes > limits.maximum_bytes:
        return _too_long(place, num_bytes, limits)
    return Document(text, position, place)


def _too_long(place: str, num_bytes: int, limits: DocumentsSection) -> Unusable:
    detail = f"{num_bytes:,} bytes, more than documents.maximum_bytes = {limits.maximum_bytes:,}"
    return Unusable("too long", place, detail, num_bytes)


def _decoded(
    data: bytes, position: int, place: str, source: Source, limits: DocumentsSection
) -> Record:
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    if b"\0" in data and source.encoding != "utf-16":
        return Unusable("binary", place, f"byte {data.index(0):,} is zero", len(data))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as cause:
        detail = f"byte {cause.start:,} is not {source.encoding}"
        return Unusable(f"not {source.encoding}", place, detail, len(data))
    return check_text(text, position, place, limits)


def _read_text(path: Path, source: Source, limits: DocumentsSection) -> Iterator[Record]:
    with open_plain(path) as file:
        if source.separator:
            yield from _read_separated(file, path, source, limits)
            return
        data = file.read(limits.maximum_bytes + 1)
        if len(data) > limits.maximum_bytes:
            yield _too_long(path.name, len(data) + _length(file), limits)
        else:
            yield _decoded(data, 0, path.name, source, limits)


def _length(file: BinaryIO) -> int:
    count = 0
    while block := file.read(2**20):
        count += len(block)
    return count


def _read_separated(
    file: BinaryIO, path: Path, source: Source, limits: DocumentsSection
) -> Iterator[Record]:
    mark = source.separator.encode(source.encoding)
    parts: list[bytes] = []
    num_bytes, position, first_line = 0, 0, 1

    def finished() -> Record:
        place = f"{path.name}:{first_line}"
        if num_bytes > limits.maximum_bytes:
            return _too_long(place, num_bytes, limits)
        return _decoded(b"\n".join(parts), position, place, source, limits)

    for number, (line, length) in enumerate(lines(file, limits.maximum_bytes), 1):
        if line.rstrip(b"\r") == mark:
            yield finished()
            parts, num_bytes, position, first_line = [], 0, position + 1, number + 1
            continue
        num_bytes += length + 1
        if num_bytes <= limits.maximum_bytes:
            parts.append(line)
    # Nothing after the last separator is no document; nothing in the whole file is an empty one.
    if num_bytes or not position:
        yield finished()


def _read_json_lines(path: Path, source: Source, limits: DocumentsSection) -> Iterator[Record]:
    # Six characters of JSON may spell one of text, and there are other keys.
    maximum_bytes = 8 * limits.maximum_bytes + 2**20
    with open_plain(path) as file:
        position = 0
        for number, (line, length) in enumerate(lines(file, maximum_bytes), 1):
            place = f"{path.name}:{number}"
            if length > maximum_bytes:
                yield _too_long(place, length, limits)
            elif line.strip():
                yield _json_record(line, position, place, source, limits)
            else:
                continue
            position += 1


def _json_record(
    line: bytes, position: int, place: str, source: Source, limits: DocumentsSection
) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as cause:
        detail = f"byte {cause.start:,} of the line is not UTF-8"
        return Unusable("not utf-8", place, detail, len(line))
    except (RecursionError, ValueError) as cause:
        return Unusable("not JSON", place, " ".join(str(cause).split())[:120], len(line))
    text = value.get(source.field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return Unusable("no text", place, f"no text under {source.field!r}", len(line))
    return check_text(text, position, place, limits)


def _read_parquet(path: Path, source: Source, limits: DocumentsSection) -> Iterator[Record]:
    from jamba_lm.corpus.parquet import texts

    for position, text in enumerate(texts(path, source.field)):
        place = f"{path.name}:{position + 1}"
        if text is None:
            yield Unusable("no text", place, f"no text under {source.field!r}", 0)
        else:
            yield check_text(text, position, place, limits)
