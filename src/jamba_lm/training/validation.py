"""How well a model predicts held-out documents, in bits per byte of their text.

Knows no optimizer and no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from jamba_lm.data import PackedBatch
from jamba_lm.training.together import ALONE, Together

Predict = Callable[[Sequence[PackedBatch]], list[tuple[float, int]]]
"""Reads batches, perhaps several at the same time; returns for each of them the summed cross
entropy of this process' rows, and how many they are."""


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
    batches: Iterator[PackedBatch],
    predict: Predict,
    *,
    num_bytes: int,
    at_once: int = 1,
    together: Together = ALONE,
) -> Validation:
    """Read every batch and measure how surprising its targets were.

    Args:
        batches: the held-out text.
        predict: the model.
        num_bytes: UTF-8 bytes of what the batches predict.
        at_once: batches that `predict` is given in one call, at most. It changes no bit.
        together: the processes that read, each with a call of its own.
    """
    nats, num_tokens = 0.0, 0
    shares = _shares(batches, together.reader, together.readers)
    while some := list(islice(shares, at_once)):
        results = predict([packed for packed, _ in some])
        for (found, predicted), (_, counts) in zip(results, some, strict=True):
            if counts:
                nats += found
                num_tokens += predicted
    nats, tokens = together.add_up([nats, num_tokens])
    return Validation(nats / tokens, nats / math.log(2) / num_bytes, int(tokens), num_bytes)


def _shares(
    batches: Iterator[PackedBatch], reader: int, readers: int
) -> Iterator[tuple[PackedBatch, bool]]:
    """Yield every `readers`th batch, and whether it counts.

    All readers get equally many, for a pass is made by all processes together: where there is none
    left for one of them, it gets another one's, which does not count.
    """
    while turn := list(islice(batches, readers)):
        yield (turn[reader], True) if reader < len(turn) else (turn[0], False)
