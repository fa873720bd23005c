"""Tensors and packed weights, described as the native products take their matrices.

O outputs (rows of the matrix), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_lm.kernels.native_structs import (
    BF16_KIND,
    F32_KIND,
    INT4_KIND,
    INT8_KIND,
    Matrix,
    MatrixStruct,
    RowRounding,
)
from jamba_lm.kernels.packed_weights import Int8Weight, PackedWeight

_FLOAT_KINDS = {torch.float32: F32_KIND, torch.bfloat16: BF16_KIND}


def why_not_matrix(weight: Tensor | PackedWeight) -> str | None:
    """Say why the native products cannot take `weight`, or None when they can."""
    if weight.device.type != "cpu":
        return f"a matrix is on {weight.device}, not on the CPU"
    if isinstance(weight, Tensor):
        if weight.dtype not in _FLOAT_KINDS:
            return f"a matrix is {weight.dtype}, the kernel takes torch.float32 and torch.bfloat16"
        if not weight.is_contiguous():
            return "a matrix is not contiguous"
    return None


def describe_matrix(
    weight: Tensor | PackedWeight, bias_O: Tensor | None, *, rows8: RowRounding = RowRounding.NONE
) -> Matrix:
    """Describe a matrix that `why_not_matrix` has nothing against.

    Args:
        weight: `[O, I]`.
        bias_O: added to the product, or None.
        rows8: whether bfloat16 rows that meet a packed matrix may be rounded to 8 bits as well.
    """
    outputs, inputs = weight.shape
    bias = None if bias_O is None else bias_O.detach().to(torch.float32).contiguous()
    values, scale, minimum = weight, None, None
    group = 0
    if isinstance(weight, Tensor):
        kind = _FLOAT_KINDS[weight.dtype]
        # Not the parameter itself: replacing its data would free what the struct points to.
        values = weight.detach()
    elif isinstance(weight, Int8Weight):
        kind = INT8_KIND
        values, scale = weight.values_OI, weight.scale_O
    else:
        kind, group = INT4_KIND, weight.group
        values, scale, minimum = weight.packed, weight.scale_OJ, weight.minimum_OJ
    parts = (values, scale, minimum, bias)
    places = (None if x is None else x.data_ptr() for x in parts)
    return Matrix(MatrixStruct(kind, outputs, inputs, group, *places, rows8), parts)
