"""The modules that stand in a quantised decoder where `nn.Linear` and `nn.Embedding` stood.

They are called as those are. Their weight is no parameter: it is not trained, and a change of the
module's dtype does not touch it.

M rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from jamba_lm.kernels import ops
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.kernels.packed_weights import PackedWeight


class PackedLinear(nn.Module):
    """y = x W^T + bias, with the weight in 8 or 4 bits and activations as they come.

    Attributes:
        weight: the packed matrix.
        bias: a parameter, or None.
        backend: kernel back-end by name, or None for the fastest that can. A module of the model
            is not told the caller's wish with every call, as `nn.Linear` has none.
        rows8: whether many rows in bfloat16 may be rounded to 8 bits, where whole prompts are read
            by native calls; this module itself never does.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: nn.Parameter | None = None,
        *,
        rows8: RowRounding = RowRounding.NONE,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.rows8 = rows8
        self.backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (..., O) of the dtype of `x`, which is (..., I)."""
        if x.dim() == 2:
            return ops.packed_linear(x, self.weight, self.bias, backend=self.backend)
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = ops.packed_linear(x_MI, self.weight, self.bias, backend=self.backend)
        return y_MO.view(*x.shape[:-1], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight = _moved(self.weight, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix, turned into floats when they are looked up.

    Attributes:
        weight: the packed matrix, a row per token of the vocabulary.
        dtype: of the rows that are returned.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of int64 `ids` of any shape (...), as (..., I)."""
        rows_MI = self.weight.take(ids.flatten()).dequantize(self.dtype)
        return rows_MI.view(*ids.shape, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight = _moved(self.weight, fn)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _moved(weight: PackedWeight, fn: Callable[[Tensor], Tensor]) -> PackedWeight:
    # `fn` may narrow types as well; only the device is taken from it.
    return weight.to(fn(torch.empty(0, device=weight.device)).device)
