"""The softmax of a loss of native/row_ops.cpp. No autograd: a loss asks for its own slopes.

Dimension key: M rows, V words of a vocabulary, or of a part of it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from jamba_lm.kernels.library import loaded_library

# The structs of native/jamba_kernels.h: 8-byte members only.
_SUMS = struct.Struct("=9q")
_SLOPES = struct.Struct("=11q")

# JAMBA_U: the scores are bfloat16.
_IS_BFLOAT16 = 1


def softmax_sums(scores_MV: Tensor, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Run `reference.softmax_sums` natively; `path` forces an instruction set, for tests."""
    largest_M, sum_M = torch.empty(2, len(scores_MV), dtype=torch.float32)
    if len(scores_MV):
        call = _pack(scores_MV, largest_M, sum_M.data_ptr(), path)
        loaded_library().call("jamba_softmax_sums", _SUMS.pack(*call))
    return largest_M, sum_M


def softmax_slopes_(
    scores_MV: Tensor,
    largest_M: Tensor,
    share_M: Tensor,
    targets_M: Tensor,
    *,
    path: str | None = None,
) -> Tensor:
    """Run `reference.softmax_slopes_` natively; `path` forces an instruction set, for tests."""
    if len(scores_MV):
        share_M, targets_M = share_M.contiguous(), targets_M.contiguous()
        call = _pack(scores_MV, largest_M.contiguous(), 0, path)
        loaded_library().call(
            "jamba_softmax_slopes", _SLOPES.pack(*call, share_M.data_ptr(), targets_M.data_ptr())
        )
    return scores_MV


def _pack(scores_MV: Tensor, largest_M: Tensor, sums: int, path: str | None) -> tuple[int, ...]:
    return (
        loaded_library().path_code(path),
        torch.get_num_threads(),
        _IS_BFLOAT16 if scores_MV.dtype is torch.bfloat16 else 0,
        *scores_MV.shape,
        scores_MV.data_ptr(),
        scores_MV.stride(0),
        largest_M.data_ptr(),
        sums,
    )
