"""Matrices as the native products take them: float or packed, described by one struct.

O outputs (rows of the matrix), I inputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from jamba_lm.kernels.packed_weights import Int8Weight, PackedWeight

# JAMBA_F32 .. JAMBA_INT4 of native/jamba_kernels.h.
_FLOAT_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8_KIND, _INT4_KIND = 2, 3


class MatrixStruct(ctypes.Structure):
    """`jamba_matrix` of native/jamba_kernels.h."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("O", ctypes.c_int64),
        ("I", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows8", ctypes.c_int64),
    )


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
    weight: Tensor | PackedWeight,
    bias_O: Tensor | None,
    keep: list[Tensor],
    *,
    rows8: bool = False,
) -> MatrixStruct:
    """Return the struct of a matrix that `why_not_matrix` has nothing against.

    Args:
        weight: `[O, I]`.
        bias_O: added to the product, or None.
        keep: receives every tensor that the struct points into; it must live as long.
        rows8: bfloat16 rows that meet a matrix of 8 bits may be rounded to 8 bits as well, when
            they are many and the processor multiplies such numbers.
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
        kind = _INT8_KIND
        values, scale = weight.values_OI, weight.scale_O
    else:
        kind, group = _INT4_KIND, weight.group
        values, scale, minimum = weight.packed, weight.scale_OJ, weight.minimum_OJ
    parts = (values, scale, minimum, bias)
    keep += [part for part in parts if part is not None]
    return MatrixStruct(
        kind, outputs, inputs, group, *(None if x is None else x.data_ptr() for x in parts), rows8
    )
