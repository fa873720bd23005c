"""Root-mean-square normalisation with a learned gain, and its absence.

Knows only the width it normalises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch


class RMSNorm(nn.Module):
    """`ops.rms_norm` over the last axis, with the published order of rounding.

    Source: transformers `JambaRMSNorm`.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return `x` of shape (..., width), normalised, in its own dtype."""
        return ops.rms_norm(x, self.weight, self.eps, backend=batch.backend)


class NoNorm(nn.Module):
    """What stands in the place of an inner norm in a model without them."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return `x` as it is."""
        return x
