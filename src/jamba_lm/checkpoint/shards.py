"""The weight files of a checkpoint folder, one or many, opened as one set of tensors.

Knows the file layout of Hugging Face folders; knows nothing of what the tensors are called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from jamba_lm.checkpoint.diagnosis import listed, shown
from jamba_lm.errors import CheckpointError
from jamba_lm.files import read_json, write_json
from jamba_lm.tensor_file import TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")
OURS = re.compile(
    r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_)?config\.json"
)


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
        folder = Path(folder)
        single, index = folder / SINGLE, folder / INDEX
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{str(folder)!r} holds both {SINGLE} and {INDEX}: "
                "remove the one that does not belong to this model"
            )
        if single.exists():
            return cls([_open(single)])
        if index.exists():
            return cls(_open_shards(folder, index))
        raise CheckpointError(f"no weights in {str(folder)!r}: {_what_is_there(folder)}")

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


def _open(path: Path) -> TensorFile:
    return TensorFile(path, error=CheckpointError)


def _open_shards(folder: Path, index: Path) -> list[TensorFile]:
    weight_map = read_json(index, "weight index", CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"weight index {str(index)!r} has no 'weight_map' of tensor names to file names"
        )
    expected: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise CheckpointError(
                f"weight index {str(index)!r} puts {shown(name)} into {shown(str(shard))!r}: "
                "expected the plain name of a .safetensors file in the same folder"
            )
        expected.setdefault(shard, set()).add(name)
    absent = sorted(shard for shard in expected if not (folder / shard).is_file())
    if absent:
        raise CheckpointError(
            f"{len(absent)} of the {len(expected)} shards in {str(index)!r} are not there: "
            f"{listed(absent)}; is the download complete?"
        )
    files = []
    for shard, names in sorted(expected.items()):
        file = _open(folder / shard)
        files.append(file)
        stored = set(file.names)
        if stored != names:
            lacks, extra = sorted(names - stored), sorted(stored - names)
            raise CheckpointError(
                f"shard {str(folder / shard)!r} disagrees with {INDEX}: "
                + (f"it lacks {listed(lacks)}" if lacks else f"it also holds {listed(extra)}")
                + "; do all files come from the same checkpoint?"
            )
    return files


def _is_plain_file_name(name: str) -> bool:
    # Symbolic links are the user's own (the Hugging Face cache is made of them); what an index
    # from elsewhere may not do is to spell a path.
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors", name) is not None


def _what_is_there(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if PICKLES.fullmatch(name)]
    if pickles:
        return (
            f"{listed(pickles)} are pickle files, which can run any code when read and so never "
            "are; save the model as safetensors where you trust it (transformers' "
            "save_pretrained does)"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f", found {listed(others)}" if others else ""
    return f"expected {SINGLE}, or {INDEX} and its shards{found}"


def is_ours(name: str) -> bool:
    """Tell whether a file of this name is part of what a checkpoint's writing replaces."""
    return OURS.fullmatch(name) is not None


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
