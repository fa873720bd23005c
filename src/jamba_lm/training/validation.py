"""How well a model predicts held-out documents, in bits per byte of their text.

Knows no optimizer and no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from jamba_lm.data import PackedBatch
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.training.loss import summed_cross_entropy


@dataclass(frozen=True, slots=True)
class Validation:
    """What a reading of the held-out documents gave.

    Attributes:
        loss: mean cross entropy of a token, in nats.
        bits_per_byte: bits for all tokens, end tokens too, over the bytes of the text: a measure
            that does not depend on the tokenizer.
        num_tokens: tokens predicted.
        num_bytes: UTF-8 bytes of the text.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


@torch.no_grad()
def validate(
    decoder: Decoder,
    batches: Iterable[PackedBatch],
    *,
    num_bytes: int,
    backend: str | None = None,
) -> Validation:
    """Read every batch and measure how surprising its targets were.

    Args:
        decoder: predicts.
        batches: the held-out text.
        num_bytes: UTF-8 bytes of what they predict.
        backend: kernel back-end by name, or None.
    """
    nats, num_tokens = 0.0, 0
    for packed in batches:
        batch = Batch.of(packed.lengths, backend=backend)
        hidden_MD = decoder(packed.ids_M, batch, hidden=True)
        weight_VD = output_weight(decoder)
        nats += summed_cross_entropy(hidden_MD, weight_VD, packed.targets_M).item()
        num_tokens += packed.num_targets
    return Validation(nats / num_tokens, nats / math.log(2) / num_bytes, num_tokens, num_bytes)


def output_weight(decoder: Decoder) -> torch.Tensor:
    """Return the weights [V, D] that turn hidden states into logits."""
    return decoder.embedding.weight if decoder.head is None else decoder.head.weight
