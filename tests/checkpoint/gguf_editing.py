"""GGUF files to read, to change and to read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jamba_lm.config import JambaConfig
from jamba_lm.conversion import folder_to_gguf
from jamba_lm.gguf_file import BLOCK_TYPES, TYPE_CODES, GgufFile
from jamba_lm.gguf_output import TensorToWrite, Typed, write_gguf
from tests.arms import SMALL, shaken_model

Values = dict[str, Typed]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def gguf(folder: Path, config: JambaConfig = SMALL, file_type: str = "f32") -> Path:
    """Write a model with random weights and no tokenizer, and return its file."""
    shaken_model(config, seed=1).save(folder / "folder")
    folder_to_gguf(folder / "folder", folder / "model.gguf", file_type=file_type)
    return folder / "model.gguf"


def edit(path: Path, change: Callable[[Values, Tensors], Any]) -> Path:
    """Rewrite a file with what `change` makes of its header and its tensors."""
    file = GgufFile(path)
    values: Values = {key: (str(file.type_of(key)), file.get(key)) for key in file.keys}
    tensors: Tensors = {
        name: (place.kind.name, place.shape, bytes(file.view(name)))
        for name, place in file.tensors.items()
    }
    change(values, tensors)
    write_gguf(
        path,
        values,
        [
            TensorToWrite(name, BLOCK_TYPES[TYPE_CODES[kind]], shape, lambda data=data: [data])
            for name, (kind, shape, data) in tensors.items()
        ],
    )
    return path
