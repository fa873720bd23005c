"""What a GGUF file stores of each type, and what loading makes of it. Needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_parts import open_gguf

# Plain types are kept as they are; all others are decoded to bfloat16.
LOADED_AS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DECODED_AS = "bf16"


@dataclass(frozen=True, slots=True)
class StoredType:
    """All tensors of one type.

    Attributes:
        name: the type's.
        tensors: how many there are.
        values: how many numbers they hold.
        num_bytes: what they take in the file.
    """

    name: str
    tensors: int
    values: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufContents:
    """What a file holds.

    Attributes:
        types: those of its tensors, that which takes most bytes first.
        loaded_as: the format in which weights are kept after loading, unless another is asked for.
    """

    types: tuple[StoredType, ...]
    loaded_as: str


def read_contents(path: str | Path) -> GgufContents:
    """Read what a GGUF file holds, no weights.

    Raises:
        CheckpointError: no sound GGUF file.
    """
    file = open_gguf(path)
    return GgufContents(tuple(stored_types(file)), loaded_format(file))


def stored_types(file: GgufFile) -> list[StoredType]:
    """List the types of a file's tensors, those that take most bytes first."""
    places = list(file.tensors.values())
    found = []
    for name in {place.kind.name for place in places}:
        mine = [place for place in places if place.kind.name == name]
        values = sum(prod(place.shape) for place in mine)
        found.append(StoredType(name, len(mine), values, sum(place.size for place in mine)))
    return sorted(found, key=lambda one: (-one.num_bytes, one.name))


def loaded_format(file: GgufFile) -> str:
    """Return the format in which weights are kept after loading, unless another is asked for.

    It is the one that most values of the matrices are loaded in.
    """
    values: Counter[str] = Counter()
    for place in file.tensors.values():
        if len(place.shape) > 1:
            values[LOADED_AS.get(place.kind.name, DECODED_AS)] += prod(place.shape)
    return values.most_common(1)[0][0]
