"""Small checkpoint folders to read, to spoil and to read again."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.config import JambaConfig
from tests.arms import SMALL

TINY = SMALL.replace(vocab_size=23, d_model=8, d_ff=12, state_size=4, num_heads=2, num_kv_heads=1)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def checkpoint(
    folder: Path, config: JambaConfig = TINY, *, dtype: str = "fp32", shard_bytes: int = 10**9
) -> Path:
    """Write a checkpoint with random weights and return its folder."""
    write_random_checkpoint(folder, config, dtype=dtype, shard_bytes=shard_bytes)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the weights of a folder by what `change` makes of them."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(weights), folder / WEIGHTS, {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    edit_json(folder / "config.json", lambda values: values | changes)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace a JSON file by what `change` makes of its content."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def raw_safetensors(path: Path, header: object, data: bytes) -> None:
    """Write a file in the layout of safetensors, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Tell whether two decoders hold the same bits under the same names."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )
