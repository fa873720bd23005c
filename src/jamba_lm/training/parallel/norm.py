"""Norms whose gain all processes hold whole.

Takes the place of a finished decoder's norms. Knows only where its rows are.
"""

from __future__ import annotations

from torch import Tensor, nn

from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.norm import RMSNorm
from jamba_lm.training.parallel.region import Region, local


class ParallelNorm(RMSNorm):
    """`RMSNorm` of rows that every process has all of, or a part of."""

    def __init__(self, norm: RMSNorm, region: Region | None) -> None:
        """Take the place of `norm`.

        Args:
            norm: its gain becomes this one's.
            region: at whose outside the rows are; None for rows that all processes have alike.
        """
        nn.Module.__init__(self)
        self.eps, self.weight, self.region = norm.eps, norm.weight, region

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return `x` of shape (..., width), normalised, in its own dtype."""
        gain = local(self.weight) if self.region is None else self.region.outside(self.weight)
        return ops.rms_norm(x, gain, self.eps, backend=batch.backend)
