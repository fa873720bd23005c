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
            counted_M1 = (targets_M[rows] != IGNORED)[:, None].float()
            column_M1 = targets_M[rows, None] - first
            # The target of a row is a column of one process; to the others it counts nothing.
            own_M1 = ((column_M1 >= 0) & (column_M1 < len(weight_VD))).float()
            column_M1 = column_M1.clamp(0, len(weight_VD) - 1)
            scores_MV = (hidden_MD[rows] @ weight_VD.T).float()
            largest_M1 = add_up(scores_MV.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
            scores_MV -= largest_M1
            target_M1 = own_M1 * scores_MV.gather(1, column_M1)
            sum_M1 = scores_MV.exp_().sum(-1, keepdim=True)
            sum_M1, target_M1 = add_up(torch.stack([sum_M1, target_M1]), group)
            log_sum_M1 = sum_M1.log()
            entropy += (counted_M1 * (log_sum_M1 - target_M1)).sum()
            z_M1 = log_sum_M1 + largest_M1
            squares += (counted_M1 * z_M1.square()).sum()
            if wanted:
                share_M1 = counted_M1 / sum_M1
                if z_coef:
                    share_M1 *= 1.0 + 2.0 * z_coef * z_M1
                scores_MV *= share_M1
                scores_MV.scatter_add_(1, column_M1, -counted_M1 * own_M1)
                slope_MV = scores_MV.to(weight_VD.dtype)
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
