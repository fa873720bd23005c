"""The embedding and the loss with the vocabulary split over processes.

No process ever has a whole row of logits, nor all rows of its part. Knows hidden states, weights
and targets, and no layers.

M rows, D model width, V words of the vocabulary held here.

Source: Megatron-LM (arXiv 1909.08053) §3, the parallel cross entropy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.training.loss import SummedLosses, VocabularyPart, summed_losses
from jamba_lm.training.parallel.collectives import add_up
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
    group = region.group
    if group.size == 1:
        return summed_losses(hidden_MD, weight_VD, targets_M, z_coef)

    def join(
        own_largest_M: Tensor, own_sum_M: Tensor, own_target_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        largest_M = add_up(own_largest_M.clone(), group, dist.ReduceOp.MAX)
        own_sum_M = own_sum_M * (own_largest_M - largest_M).exp()
        sum_M, target_M = add_up(torch.stack([own_sum_M, own_target_M]), group)
        return largest_M, sum_M, target_M

    part = VocabularyPart(group.rank * len(weight_VD), join)
    return summed_losses(hidden_MD, weight_VD, targets_M, z_coef, part)
