"""GGUF files, opened as a memory map: what the header says, and where each tensor lies.

Knows the container and nothing of models. Every count and offset is held against the length of
the file before anything is made of it, so that a damaged file costs an error and no memory. Needs
neither torch nor numpy, so that a header can be read in a fraction of a second.

Source: the GGUF specification (ggml `docs/gguf.md`), versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.errors import CheckpointError
from jamba_lm.files import path_kind

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_AXES = 4
MAX_NAME_BYTES = 2**16

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockType:
    """How values are stored: blocks of `values` numbers in `size` bytes each."""

    name: str
    values: int
    size: int


# The number in the file -> the type. Source: ggml.h; a test holds this against the gguf package.
BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
TYPE_CODES: Mapping[str, int] = {kind.name: code for code, kind in BLOCK_TYPES.items()}

# The number in the file -> the name of a value's type and its layout for `struct`.
SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "B"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a file.

    Attributes:
        kind: how its values are stored.
        shape: its axes, the slowest first (the file has the fastest first).
        start: its first byte in the file.
        size: its length in bytes.
    """

    kind: BlockType
    shape: Shape
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the header, not decoded yet: scalars and arrays of them, strings and arrays."""

    code: int
    start: int
    count: int | None


class GgufFile:
    """A GGUF file, checked and mapped. Its values and tensors are decoded when asked for.

    Attributes:
        path: the file.
        tensors: where each tensor lies, by name, in the order of the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Map `path` and check its header.

        Raises:
            CheckpointError: no such file, or not a sound GGUF file.
        """
        self.path = Path(path)
        if path_kind(self.path) != "file":
            raise CheckpointError(f"no file at {str(path)!r}: expected a GGUF file")
        try:
            with self.path.open("rb") as file:
                # Private, so that tensors that share the map may be written to, and the file not.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise self.broken(f"it cannot be mapped ({error})") from error
        self._size = len(self._map)
        self._at = 0
        self._values: dict[str, _Value] = {}
        self.tensors: Mapping[str, TensorPlace] = {}
        self._read_header()

    def broken(self, reason: str) -> CheckpointError:
        """Return the error that says what is wrong with the file."""
        return CheckpointError(
            f"{str(self.path)!r} is not a sound GGUF file: {reason}; it may be cut short: "
            "get it again"
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the header, in the order of the file."""
        return tuple(self._values)

    def type_of(self, key: str) -> str | None:
        """Return the type of a value ("uint32", "string", "int32[]"), or None without the key."""
        value = self._values.get(key)
        if value is None:
            return None
        name = "string" if value.code == STRING else SCALARS[value.code][0]
        return name if value.count is None else f"{name}[]"

    def length(self, key: str) -> int | None:
        """Return how many elements an array has, undecoded; None for any other value."""
        value = self._values.get(key)
        return None if value is None else value.count

    def get(self, key: str) -> Any:
        """Return a value of the header as plain Python, or None when there is no such key.

        Raises:
            CheckpointError: a string that is not UTF-8.
        """
        value = self._values.get(key)
        if value is None:
            return None
        if value.code == STRING:
            return self._strings(key, value)
        name, layout = SCALARS[value.code]
        count = 1 if value.count is None else value.count
        found: list[Any] = list(struct.unpack_from(f"<{count}{layout}", self._map, value.start))
        if name == "bool":
            found = [bool(one) for one in found]
        return found[0] if value.count is None else found

    def _strings(self, key: str, value: _Value) -> Any:
        found, at = [], value.start
        for _ in range(1 if value.count is None else value.count):
            length = int.from_bytes(self._map[at : at + 8], "little")
            try:
                found.append(self._map[at + 8 : at + 8 + length].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.broken(f"{_shown(key)} holds text that is not UTF-8") from error
            at += 8 + length
        return found[0] if value.count is None else found

    def view(self, name: str) -> memoryview:
        """Return the bytes of a tensor, which share the map and keep it alive."""
        place = self.tensors[name]
        return memoryview(self._map)[place.start : place.start + place.size]

    def _read_header(self) -> None:
        if self._map[:4] != MAGIC:
            raise self.broken(f"it starts with {self._map[:4]!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._integer(4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (it was written for big-endian machines)" if swapped in VERSIONS else ""
            raise self.broken(f"version {version}{hint}, expected 2 or 3 in little-endian order")
        num_tensors, num_values = self._integer(8), self._integer(8)
        # The least that a tensor's or a value's description takes.
        self._require(num_tensors * 24 + num_values * 13, f"{num_tensors} tensors")
        for _ in range(num_values):
            key = self._name("a key")
            if key in self._values:
                raise self.broken(f"the key {_shown(key)} is given twice")
            self._values[key] = self._value(key)
        described = [self._tensor() for _ in range(num_tensors)]
        self.tensors = self._placed(described)

    def _require(self, count: int, what: str) -> None:
        left = self._size - self._at
        if count > left:
            raise self.broken(f"{what} need {count:,} bytes at {self._at:,}, {left:,} are left")

    def _integer(self, width: int) -> int:
        self._require(width, "a number")
        self._at += width
        return int.from_bytes(self._map[self._at - width : self._at], "little")

    def _name(self, what: str) -> str:
        length = self._integer(8)
        if length > MAX_NAME_BYTES:
            raise self.broken(f"{what} of {length:,} bytes")
        self._require(length, what)
        self._at += length
        try:
            return self._map[self._at - length : self._at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not UTF-8") from error

    def _value(self, key: str) -> _Value:
        code = self._integer(4)
        count = None
        if code == ARRAY:
            code, count = self._integer(4), self._integer(8)
        start = self._at
        if code == STRING:
            self._require(8 * (1 if count is None else count), f"the strings of {_shown(key)}")
            for _ in range(1 if count is None else count):
                length = self._integer(8)
                self._require(length, f"a string of {_shown(key)}")
                self._at += length
        elif code in SCALARS:
            size = struct.calcsize(SCALARS[code][1]) * (1 if count is None else count)
            self._require(size, f"the values of {_shown(key)}")
            self._at += size
        else:
            kind = "an array of arrays" if code == ARRAY else f"of the unknown type {code}"
            raise self.broken(f"{_shown(key)} is {kind}")
        return _Value(code, start, count)

    def _tensor(self) -> tuple[str, BlockType, Shape, int]:
        name = self._name("the name of a tensor")
        axes = self._integer(4)
        if not 1 <= axes <= MAX_AXES:
            raise self.broken(f"{_shown(name)} has {axes} axes, expected 1 to {MAX_AXES}")
        shape = tuple(reversed([self._integer(8) for _ in range(axes)]))
        code, offset = self._integer(4), self._integer(8)
        kind = BLOCK_TYPES.get(code)
        if kind is None:
            raise CheckpointError(
                f"{str(self.path)!r}: {_shown(name)} is stored as type {code}, which cannot be "
                f"read; known are {', '.join(known.name for known in BLOCK_TYPES.values())}"
            )
        if 0 in shape:
            raise self.broken(f"{_shown(name)} has no values (its shape is {list(shape)})")
        if shape[-1] % kind.values:
            raise self.broken(
                f"{_shown(name)} has rows of {shape[-1]:,} values, which {kind.name} cannot store: "
                f"its blocks hold {kind.values}"
            )
        return name, kind, shape, offset

    def _placed(self, described: list[tuple[str, BlockType, Shape, int]]) -> dict[str, TensorPlace]:
        alignment = DEFAULT_ALIGNMENT
        if ALIGNMENT_KEY in self._values:
            alignment = self.get(ALIGNMENT_KEY)
            # A power of two, as ggml demands; that of a page is the most that makes sense.
            if self.type_of(ALIGNMENT_KEY) != "uint32" or alignment not in _POWERS_OF_TWO:
                raise self.broken(f"{ALIGNMENT_KEY} is {alignment!r:.40}, expected 8 to 65536")
        first = self._at + -self._at % alignment
        placed: dict[str, TensorPlace] = {}
        for name, kind, shape, offset in described:
            if name in placed:
                raise self.broken(f"the tensor {_shown(name)} is given twice")
            size = kind.size
            for extent in shape:
                size *= extent
            size //= kind.values
            start = first + offset
            if offset % alignment or start + size > self._size:
                raise self.broken(
                    f"{_shown(name)} should lie at bytes {start:,} to {start + size:,} of "
                    f"{self._size:,}, on a multiple of {alignment}"
                )
            placed[name] = TensorPlace(kind, shape, start, size)
        # Otherwise a small file could claim any number of large tensors.
        end, before = first, "the header"
        for name, place in sorted(placed.items(), key=lambda item: item[1].start):
            if place.start < end:
                raise self.broken(f"{_shown(name)} overlaps {_shown(before)}")
            end, before = place.start + place.size, name
        return placed


_POWERS_OF_TWO = tuple(2**power for power in range(3, 17))


def _shown(name: str) -> str:
    """Make a name out of a file fit for a one-line message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def is_gguf(path: str | Path) -> bool:
    """Tell, by its name, whether a path means a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX and path_kind(path) != "folder"
