"""Tensors in ggml's block formats, to and from torch. The only file that imports `gguf`.

F32, F16 and BF16 are plain numbers and need no package; of every other type the package knows the
blocks. Works on a piece at a time, so that a large tensor is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jamba_lm.errors import CheckpointError
from jamba_lm.gguf_file import TYPE_CODES, BlockType, Shape

PLAIN: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# A multiple of every block's length.
PIECE_VALUES = 2**20


@cache
def _quants() -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise CheckpointError(
            "quantised GGUF types need the package 'gguf', which is not installed: "
            "pip install 'jamba-lm[gguf]'"
        ) from error
    return quants


def _code(kind: BlockType) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(TYPE_CODES[kind.name])


def plain_view(data: memoryview, kind: BlockType, shape: Shape) -> Tensor:
    """Return a tensor of a plain type that shares the bytes."""
    return torch.frombuffer(data, dtype=PLAIN[kind.name]).view(shape)


def decode(data: memoryview, kind: BlockType, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return the values of a tensor, as a new tensor unless it is of that plain type already.

    Args:
        data: its bytes.
        kind: how they are to be read.
        shape: its axes, rows last.
        dtype: of the result; quantised values are computed in float32 and rounded once.

    Raises:
        CheckpointError: a quantised type, and the package `gguf` is missing.
    """
    if kind.name in PLAIN:
        return plain_view(data, kind, shape).to(dtype)
    quants, code = _quants(), _code(kind)
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, kind.size)
    decoded = torch.empty(len(blocks) * kind.values, dtype=dtype)
    step = PIECE_VALUES // kind.values
    for first in range(0, len(blocks), step):
        # As one row: the package works on 16 rows at a time, however short they are.
        values = quants.dequantize(blocks[first : first + step].reshape(1, -1), code)
        start = first * kind.values
        decoded[start : start + values.size] = torch.from_numpy(values[0])
    return decoded.view(shape)


def encode(value: Tensor, kind: BlockType, name: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces.

    Args:
        value: any float type.
        kind: a plain type, or one that the package can make (Q8_0, Q4_0).
        name: of the tensor, for messages.

    Raises:
        CheckpointError: a value is too large for F16.
        CheckpointError: a quantised type, and the package `gguf` is missing.
    """
    flat = value.detach().reshape(-1)
    for first in range(0, len(flat), PIECE_VALUES):
        piece = flat[first : first + PIECE_VALUES]
        if kind.name in PLAIN:
            plain = piece.to(PLAIN[kind.name])
            if kind.name == "F16" and plain.isinf().sum() > piece.isinf().sum():
                raise CheckpointError(
                    f"{name} holds {piece.abs().max():.4g}, and F16 ends at 65504: "
                    "choose --type bf16 or f32"
                )
            yield plain.view(torch.uint8).numpy().data
        else:
            values = piece.float().reshape(1, -1).numpy()
            yield _quants().quantize(values, _code(kind)).data
