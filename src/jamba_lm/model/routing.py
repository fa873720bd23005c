"""What the routers of a forward pass decided, and the loss that balances them.

Does not know the experts.

M rows, X experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jamba_lm.errors import InputError


@dataclass(frozen=True, slots=True)
class Routing:
    """One mixture's decision: probabilities over all experts, and the experts taken.

    Attributes:
        probability_MX: softmax over all experts, float32, differentiable.
        expert_MK: the experts taken, int64.
    """

    probability_MX: Tensor
    expert_MK: Tensor


class RoutingLog(Protocol):
    """What decisions are written to: a list, or anything else that takes them."""

    def append(self, decision: Routing, /) -> None:
        """Take the decision of the next mixture."""


def balance_loss(routings: Sequence[Routing]) -> Tensor:
    """Return how unevenly the experts are used, over all layers and rows together.

        X * sum over experts of (selections of it per row) * (its mean probability)

    Selections per row add up to K, so perfect balance gives K (2.0 for Jamba), not 1.

    Source: transformers `load_balancing_loss_func`, after Switch Transformer eq. 4-6.

    Returns:
        A float32 scalar, differentiable through the probabilities.

    Raises:
        InputError: no mixture of experts took part.
    """
    if not routings:
        raise InputError(
            "no routing was recorded: the balance loss needs a model with num_experts > 1 and a "
            "forward pass with Batch.of(..., routing=[])"
        )
    probability_MX = torch.cat([one.probability_MX for one in routings])
    expert_MK = torch.cat([one.expert_MK for one in routings])
    num_rows, num_experts = probability_MX.shape
    selections_X = torch.bincount(expert_MK.flatten(), minlength=num_experts).float()
    return num_experts * (selections_X / num_rows * probability_MX.mean(0)).sum()
