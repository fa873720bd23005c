"""Writes GGUF files: a header of values, then tensors that are made one at a time.

Knows the container and nothing of models. The file appears whole or not at all.

Source: the GGUF specification (ggml `docs/gguf.md`), version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jamba_lm.files import write_atomic
from jamba_lm.gguf_file import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    SCALARS,
    STRING,
    TYPE_CODES,
    BlockType,
    Shape,
)

VERSION = 3
_CODES: Mapping[str, int] = {name: code for code, (name, _) in SCALARS.items()} | {"string": STRING}
_LAYOUTS: Mapping[str, str] = dict(SCALARS.values())

# The type's name as `GgufFile.type_of` gives it, and the value.
Typed = tuple[str, Any]
Pieces = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """One tensor of the file to be.

    Attributes:
        name: its name.
        kind: how its values are stored.
        shape: its axes, the slowest first.
        pieces: makes its bytes, in pieces that follow one another; called once.
    """

    name: str
    kind: BlockType
    shape: Shape
    pieces: Callable[[], Pieces]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        size = self.kind.size
        for extent in self.shape:
            size *= extent
        return size // self.kind.values


def write_gguf(
    path: str | Path,
    values: Mapping[str, Typed],
    tensors: Sequence[TensorToWrite],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a file beside its place and rename it when it is complete.

    Args:
        path: where to; an existing file is replaced in one step.
        values: the header, each with its type: ("uint32", 8), ("string[]", ["a", "b"]).
        tensors: asked for their bytes one after the other.
        progress: called with the bytes of tensors written, and in all.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: the operating system refused.
    """
    header = _header(values, tensors)
    total = sum(tensor.size for tensor in tensors)

    def write(file: BinaryIO) -> None:
        file.write(header)
        done = 0
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                written += file.write(piece)
                if progress is not None:
                    progress(done + written, total)
            assert written == tensor.size, tensor.name
            file.write(bytes(_padding(written)))
            done += written

    write_atomic(path, write)
    return total


def _header(values: Mapping[str, Typed], tensors: Sequence[TensorToWrite]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, typed in values.items():
        parts += [_string(key), _value(*typed)]
    offset = 0
    for tensor in tensors:
        axes = tuple(reversed(tensor.shape))
        code = TYPE_CODES[tensor.kind.name]
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, code, offset),
        ]
        offset += tensor.size + _padding(tensor.size)
    text = b"".join(parts)
    return text + bytes(_padding(len(text)))


def _padding(size: int) -> int:
    return -size % DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(kind: str, value: Any) -> bytes:
    element = kind.removesuffix("[]")
    code = _CODES[element]
    if not kind.endswith("[]"):
        return struct.pack("<I", code) + _elements(element, [value])
    head = struct.pack("<IIQ", ARRAY, code, len(value))
    return head + _elements(element, value)


def _elements(element: str, values: Sequence[Any]) -> bytes:
    if element == "string":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{_LAYOUTS[element]}", *values)
