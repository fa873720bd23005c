"""The weight files of a checkpoint folder, one or many, opened as one set of tensors.

Knows the file layout of Hugging Face folders; knows nothing of what the tensors are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from jamba_lm.checkpoint.diagnosis import listed
from jamba_lm.checkpoint.weight_layout import INDEX, SINGLE, find_weight_files
from jamba_lm.errors import CheckpointError
from jamba_lm.files import write_json
from jamba_lm.tensor_file import TensorFile


class WeightFiles:
    """All stored tensors of a folder, memory-mapped: a tensor is read when it is used."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self._files = tuple(files)
        self._home = {name: file for file in self._files for name in file.names}

    @classmethod
    def open(cls, folder: str | Path) -> WeightFiles:
        """Open `model.safetensors`, or every shard that the index file names.

        Raises:
            CheckpointError: no safetensors file, both layouts at once, an index that names a
                file outside the folder or disagrees with the shards, or a damaged file.
        """
        found = find_weight_files(Path(folder))
        return cls([_open(path, names) for path, names in found.items()])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by stored name."""
        return {name: tuple(file.shape(name)) for name, file in self._home.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of a tensor."""
        return self._home[name].dtype(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that shares the mapped file's memory."""
        return self._home[name].tensor(name)

    def path(self, name: str) -> str:
        """Return the file that holds a tensor, for messages."""
        return str(self._home[name].path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give up the files; tensors already taken out stay valid: they hold the map."""
        for file in self._files:
            file.close()


def _open(path: Path, names: frozenset[str] | None) -> TensorFile:
    file = TensorFile(path, error=CheckpointError)
    stored = set(file.names)
    if names is not None and stored != names:
        lacks, extra = sorted(names - stored), sorted(stored - names)
        raise CheckpointError(
            f"shard {str(path)!r} disagrees with {INDEX}: "
            + (f"it lacks {listed(lacks)}" if lacks else f"it also holds {listed(extra)}")
            + "; do all files come from the same checkpoint?"
        )
    return file


def plan_shards(
    sizes: Mapping[str, int], dtypes: Mapping[str, torch.dtype], shard_bytes: int
) -> dict[str, list[str]]:
    """Deal the tensors, in their order, to files of at most `shard_bytes` each.

    Within a file wider types come first, so that every mapped tensor is aligned to its type.

    >>> f32 = dict.fromkeys("abc", torch.float32)
    >>> plan_shards({"a": 6, "b": 6, "c": 2}, f32, shard_bytes=8)
    {'model-00001-of-00002.safetensors': ['a'], 'model-00002-of-00002.safetensors': ['b', 'c']}
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    for shard in shards:
        shard.sort(key=lambda name: -dtypes[name].itemsize)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_index(folder: Path, shards: Mapping[str, list[str]], total_bytes: int) -> None:
    """Write the file that tells which tensor is in which shard."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
