"""The balance loss of a step that is taken in several passes.

Knows what routers decided, and nothing of the passes.

M rows, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_lm.model.routing import Routing


@dataclass(frozen=True, slots=True)
class Selections:
    """How often each expert is taken in all passes of a step, over all layers.

    Attributes:
        selections_X: float32.
        num_rows: rows that were routed, each layer's counted.
    """

    selections_X: Tensor
    num_rows: int


def count_selections(passes: Sequence[Sequence[Routing]]) -> Selections:
    """Count what the routers of several passes decided."""
    routings = [one for routings in passes for one in routings]
    selections_X = torch.stack([load_of(one) for one in routings]).sum(0)
    return Selections(selections_X, sum(len(one.expert_MK) for one in routings))


def load_of(routing: Routing) -> Tensor:
    """Return how often one layer takes each expert, float32 [X]."""
    num_experts = routing.probability_MX.shape[1]
    return torch.bincount(routing.expert_MK.flatten(), minlength=num_experts).float()


def share_of_balance_loss(routings: Sequence[Routing], step: Selections) -> Tensor:
    """Return what one pass adds to the balance loss of all rows of the step together.

    The loss is a product of two means, of selections and of probabilities, so the mean of the
    losses of passes is another loss, with another gradient, than that of one large pass. Given
    the selections of all of them, the shares add up to the large pass's loss.

    Returns:
        A float32 scalar, differentiable through the probabilities.
    """
    summed_X = torch.stack([one.probability_MX.sum(0) for one in routings]).sum(0)
    num_experts = len(summed_X)
    return num_experts * (step.selections_X / step.num_rows * summed_X / step.num_rows).sum()
