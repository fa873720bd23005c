"""GGUF models in several files, named as llama.cpp names them: model-00001-of-00003.gguf.

The first part has the header; each has some of the tensors. Knows nothing of models.

Source: llama.cpp `llama_split_path` and `llama_model_loader`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jamba_lm.errors import CheckpointError
from jamba_lm.files import path_kind
from jamba_lm.gguf_file import GgufFile, TensorPlace

# How many parts there are, which this is (from 0), and how many tensors all of them have.
COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"
PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL | re.IGNORECASE)
MOST_PARTS = 99_999
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file, and with the first part of several all others.

    Raises:
        CheckpointError: no sound GGUF file; not the first part; or parts are missing or do not
            belong together.
    """
    file = GgufFile(path)
    count = _number(file, COUNT)
    return file if count is None or count == 1 else _GgufParts(file, count)


class _GgufParts(GgufFile):
    """All parts as if they were one file: the header of the first, and everybody's tensors."""

    def __init__(self, first: GgufFile, count: int) -> None:
        if not 2 <= count <= MOST_PARTS:
            raise first.broken(f"{COUNT} is {count}, expected 1 to {MOST_PARTS}")
        # The header is that of the first part, which is open already.
        vars(self).update(vars(first))
        paths = _paths_of_parts(first, count)
        self._parts = [first]
        for number, path in enumerate(paths[1:], start=1):
            part = GgufFile(path)
            if (_number(part, COUNT), _number(part, NUMBER)) != (count, number):
                raise CheckpointError(
                    f"{str(path)!r} does not say that it is part {number + 1} of {count}: is it of "
                    f"another model than {first.path.name}? get it again"
                )
            self._parts.append(part)
        self._part_of: dict[str, GgufFile] = {}
        for part in self._parts:
            for name in part.tensors:
                if name in self._part_of:
                    raise part.broken(f"{name!r:.80} is in {self._part_of[name].path.name} as well")
                self._part_of[name] = part
        expected = _number(first, TENSORS)
        if expected is not None and expected != len(self._part_of):
            raise first.broken(
                f"{TENSORS} is {expected}, but the {count} parts hold {len(self._part_of)} tensors"
            )
        self.tensors: Mapping[str, TensorPlace] = {
            name: part.tensors[name] for name, part in self._part_of.items()
        }

    def view(self, name: str) -> memoryview:
        """Return the bytes of a tensor, which share the map of its part and keep it alive."""
        return self._part_of[name].view(name)


def _paths_of_parts(first: GgufFile, count: int) -> list[Path]:
    named = PART_NAME.fullmatch(first.path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{str(first.path)!r} is one part of {count}, and the others are found by their names: "
            f"expected one that ends in -00001-of-{count:05}.gguf, as it was made"
        )
    paths = [
        first.path.with_name(f"{named[1]}-{number:05}-of-{named[3]}{first.path.suffix}")
        for number in range(1, count + 1)
    ]
    number = _number(first, NUMBER)
    if number != 0 or int(named[2]) != 1:
        raise CheckpointError(
            f"{str(first.path)!r} is not the first part of {count}: open {paths[0].name}"
        )
    missing = [path.name for path in paths if path_kind(path) != "file"]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{str(first.path)!r} is the first part of {count}, but beside it there is no "
            f"{', '.join(missing[:3])}{more}: get all parts, or join them elsewhere "
            "(llama-gguf-split --merge)"
        )
    return paths


def _number(file: GgufFile, key: str) -> int | None:
    kind = file.type_of(key)
    if kind is None:
        return None
    if kind not in INTEGERS:
        raise file.broken(f"{key} is {kind}, expected a whole number")
    return int(file.get(key))
