"""The embedding and the loss with the vocabulary split over processes.

No process ever has a whole row of logits, nor all rows of its part. Knows hidden states, weights
and targets, and no layers.

M rows, D model width, V words of the vocabulary held here.

Source: Megatron-LM (arXiv 1909.08053) §3, the parallel cross entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.data import IGNORED
from jamba_lm.kernels import ops
from jamba_lm.training.loss import CHUNK_ROWS, SummedLosses, summed_losses
from jamba_lm.training.parallel.collectives import Group, add_up
from jamba_lm.training.parallel.region import Region, local


class ParallelEmbedding(nn.Embedding):
    """An embedding of which every process holds some words."""

    def __init__(self, embedding: nn.Embedding, region: Region) -> None:
        """Take the place of `embedding`, whose words the group of `region` shares."""
        nn.Module.__init__(self)
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.weight, self.region = embedding.weight, region

    def forward(self, ids_M: Tensor) -> Tensor:
        """Return the embeddings of the rows that go on here."""
        weight_VD = local(self.weight)
        first = self.region.group.rank * len(weight_VD)
        own_M = (ids_M >= first) & (ids_M < first + len(weight_VD))
        x_MD = F.embedding((ids_M - first).masked_fill(~own_M, 0), weight_VD)
        return self.region.leave(x_MD.masked_fill(~own_M[:, None], 0.0))


def losses_in_parts(
    hidden: Tensor, weight: Tensor, targets_M: Tensor, region: Region, z_coef: float = 0.0
) -> SummedLosses:
    """Return `loss.summed_losses`, from hidden states and output weights as processes hold them.

    Args:
        hidden: final hidden states of this process's rows, (rows, D).
        weight: the output weights, of which this process holds some rows.
        targets_M: the tokens to predict, of all rows of the group.
        region: who shares the vocabulary.
        z_coef: see `summed_losses`.
    """
    hidden_MD, weight_VD = region.enter(hidden, len(targets_M)), local(weight)
    if region.group.size == 1:
        return summed_losses(hidden_MD, weight_VD, targets_M, z_coef)
    apply = _LossesInParts.apply
    sums = apply(hidden_MD, weight_VD, targets_M, z_coef, region.group)  # type: ignore[no-untyped-call]
    return SummedLosses(*sums)


class _LossesInParts(torch.autograd.Function):
    """`loss._SummedLosses` over a part of the vocabulary, with the row sums added up between."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        z_coef: float,
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:2])
        entropy = hidden_MD.new_zeros((), dtype=torch.float32)
        squares = hidden_MD.new_zeros((), dtype=torch.float32)
        if wanted:
            hidden_gradient_MD = torch.empty_like(hidden_MD)
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        first = group.rank * len(weight_VD)
        for row in range(0, len(targets_M), CHUNK_ROWS):
            rows = slice(row, row + CHUNK_ROWS)
            counted_M = (targets_M[rows] != IGNORED).float()
            # The target of a row is a column of one process; to the others it counts nothing.
            column_M = targets_M[rows] - first
            own_M = ((column_M >= 0) & (column_M < len(weight_VD))).float()
            column_M1 = column_M.clamp(0, len(weight_VD) - 1)[:, None]
            scores_MV = hidden_MD[rows] @ weight_VD.T
            target_M = own_M * scores_MV.gather(1, column_M1)[:, 0].float()
            own_largest_M, sum_M = ops.softmax_sums(scores_MV)
            largest_M = add_up(own_largest_M.clone(), group, dist.ReduceOp.MAX)
            sum_M = sum_M * (own_largest_M - largest_M).exp()
            sum_M, target_M = add_up(torch.stack([sum_M, target_M]), group)
            z_M = sum_M.log() + largest_M
            entropy += (counted_M * (z_M - target_M)).sum()
            squares += (counted_M * z_M.square()).sum()
            if wanted:
                share_M = counted_M / sum_M
                if z_coef:
                    share_M *= 1.0 + 2.0 * z_coef * z_M
                slope_MV = ops.softmax_slopes_(scores_MV, largest_M, share_M, column_M)
                hidden_gradient_MD[rows] = slope_MV @ weight_VD
                weight_gradient_VD += slope_MV.T @ hidden_MD[rows]
        if wanted:
            ctx.save_for_backward(hidden_gradient_MD, weight_gradient_VD)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(entropy, squares)
        return entropy + z_coef * squares, entropy, squares

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient_MD, weight_gradient_VD = ctx.saved_tensors
        slope = slopes[0]
        return (
            hidden_gradient_MD * slope.to(hidden_gradient_MD.dtype),
            (weight_gradient_VD * slope).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
