"""Which files of a checkpoint folder hold its weights: one, or the shards that an index names.

Knows the layout of Hugging Face folders; opens no file of weights. Needs no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from jamba_lm.checkpoint.diagnosis import listed, shown
from jamba_lm.errors import CheckpointError
from jamba_lm.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")
OURS = re.compile(
    r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_)?config\.json"
)


def find_weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Return the files that hold a folder's weights, each with the names that it should hold.

    Returns:
        `model.safetensors` with None, as nothing says what is in it; or every shard that the index
        file names, with what the index says of it.

    Raises:
        CheckpointError: no safetensors file, both layouts at once, or an index that names a file
            outside the folder or one that is not there.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{str(folder)!r} holds both {SINGLE} and {INDEX}: "
            "remove the one that does not belong to this model"
        )
    if single.exists():
        return {single: None}
    if index.exists():
        return _shards(folder, index)
    raise CheckpointError(f"no weights in {str(folder)!r}: {_what_is_there(folder)}")


def _shards(folder: Path, index: Path) -> dict[Path, frozenset[str] | None]:
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
    return {folder / shard: frozenset(names) for shard, names in sorted(expected.items())}


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
