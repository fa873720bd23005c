"""From a decoder's last hidden states to its losses, whatever its output matrix is made of.

Knows decoders and losses; nothing of batches and of adapters as such.

D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from jamba_lm.model.decoder import Decoder
from jamba_lm.training.loss import Product, SummedLosses, summed_losses


@runtime_checkable
class SummedHead(Protocol):
    """A head whose logits are a sum of products, as an adapter makes them."""

    def products(self, hidden_MD: Tensor) -> Sequence[Product]:
        """Return the products for hidden states, the one with the model's own matrix first."""


def output_weight(decoder: Decoder) -> Tensor:
    """Return the weights [V, D] that turn hidden states into logits."""
    return decoder.embedding.weight if decoder.head is None else decoder.head.weight


def losses_of(
    decoder: Decoder, hidden_MD: Tensor, targets_M: Tensor, z_coef: float = 0.0
) -> SummedLosses:
    """Return `loss.summed_losses` of what `decoder` predicts from its last hidden states.

    Args:
        decoder: its head, or its embedding, makes the logits.
        hidden_MD: what it returns with `hidden=True`.
        targets_M: the tokens to predict; `data.IGNORED` for nothing.
        z_coef: see `summed_losses`.
    """
    head = decoder.head
    if isinstance(head, SummedHead):
        (states_MD, weight_VD), *more = head.products(hidden_MD)
        return summed_losses(states_MD, weight_VD, targets_M, z_coef, more=more)
    return summed_losses(hidden_MD, output_weight(decoder), targets_M, z_coef)
