"""Matrices of every kind that the kernels multiply by, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jamba_lm.kernels.packed_weights import Int8Weight, PackedWeight
from jamba_lm.quantization.grid import quantize_int4

PACKED: dict[str, Callable[[Tensor], PackedWeight]] = {
    "int8": Int8Weight.quantize,
    "int4 by 32": lambda weight: quantize_int4(weight, 32),
    "int4 by 64": lambda weight: quantize_int4(weight, 64),
}
KINDS: dict[str, Callable[[Tensor], Tensor | PackedWeight]] = {
    "fp32": lambda weight: weight,
    "bf16": lambda weight: weight.to(torch.bfloat16),
    **PACKED,
}


def matrix_of(weight: Tensor | PackedWeight) -> Tensor:
    """Return the values of a matrix in float64."""
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()


def fits(kind: str, inputs: int) -> bool:
    """Say whether a matrix of this kind may have so many inputs."""
    return inputs % (64 if kind == "int4 by 64" else 32 if kind == "int4 by 32" else 1) == 0
