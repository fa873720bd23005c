"""Products with matrices of any kind, float or packed, for few rows and for many.

M rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_matrix import describe_matrix
from jamba_lm.kernels.native_structs import MatrixStruct, RowRounding
from jamba_lm.kernels.packed_weights import PackedWeight
from jamba_lm.kernels.tensors import gradient_is_needed, with_unit_columns

# JAMBA_U: set where the rows are bfloat16.
_BFLOAT16 = 1


class _Product(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("bfloat16", ctypes.c_int64),
        ("M", ctypes.c_int64),
        ("x_MI", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y_MO", ctypes.c_void_p),
        ("matrix", MatrixStruct),
    )


class _Unpack(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("bfloat16", ctypes.c_int64),
        ("out_OI", ctypes.c_void_p),
        ("matrix", MatrixStruct),
    )


def packed_linear(
    x_MI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None, *, path: str | None = None
) -> Tensor:
    """Run `reference.packed_linear` natively; `path` forces an instruction set, for tests.

    For few rows inputs are rounded to 16-bit integers, relative to the largest of their row, and
    multiplied exactly. Many rows meet what the matrix stands for in their own dtype; so do any that
    need a gradient, by torch.
    """
    if gradient_is_needed(x_MI, bias_O):
        bias = None if bias_O is None else bias_O.to(x_MI.dtype)
        return F.linear(x_MI, unpack(weight, x_MI.dtype, path=path), bias)
    return float_linear(x_MI, weight, bias_O, path=path)


def float_linear(
    x_MI: Tensor,
    weight: Tensor | PackedWeight,
    bias_O: Tensor | None = None,
    *,
    rows8: RowRounding = RowRounding.NONE,
    path: str | None = None,
) -> Tensor:
    """Multiply rows by a matrix of any kind; `rows8` as in `describe_matrix`."""
    code = loaded_library().path_code(path)
    x_MI = with_unit_columns(x_MI)
    y_MO = x_MI.new_empty((x_MI.shape[0], weight.shape[0]))
    if not y_MO.numel():
        return y_MO
    matrix = describe_matrix(weight, bias_O, rows8=rows8)
    call = _Product(
        code,
        torch.get_num_threads(),
        _BFLOAT16 if x_MI.dtype is torch.bfloat16 else 0,
        x_MI.shape[0],
        x_MI.data_ptr(),
        x_MI.stride(0),
        y_MO.data_ptr(),
        matrix.struct,
    )
    loaded_library().call("jamba_product", bytes(call))
    return y_MO


def unpack(weight: PackedWeight, dtype: torch.dtype, *, path: str | None = None) -> Tensor:
    """Return the matrix `[O, I]` that `weight` stands for, in float32 or bfloat16."""
    code = loaded_library().path_code(path)
    out_OI = torch.empty(weight.shape, dtype=dtype)
    matrix = describe_matrix(weight, None)
    call = _Unpack(
        code,
        torch.get_num_threads(),
        _BFLOAT16 if dtype is torch.bfloat16 else 0,
        out_OI.data_ptr(),
        matrix.struct,
    )
    loaded_library().call("jamba_unpack", bytes(call))
    return out_OI
