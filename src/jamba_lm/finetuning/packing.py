"""Examples laid end to end into batches: whole, never cut, each a sequence of its own.

Knows no recipe and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from jamba_lm.data import IGNORED, PackedBatch, Position
from jamba_lm.finetuning.examples import Example


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end.

    A row is to predict the token that follows it in its own example, if that one is learned.
    """
    targets = []
    for one in examples:
        following = np.full(len(one.ids), IGNORED, dtype=np.int64)
        following[:-1][one.learned[1:]] = one.ids[1:][one.learned[1:]]
        targets.append(following)
    ids = np.concatenate([one.ids for one in examples]).astype(np.int64)
    return PackedBatch(
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate(targets)),
        [len(one.ids) for one in examples],
    )


def batches_in_order(examples: Sequence[Example], batch_tokens: int) -> Iterator[PackedBatch]:
    """Yield every example once, as many in a batch as there is room for."""
    chosen: list[Example] = []
    room = batch_tokens
    for one in examples:
        if chosen and room < len(one.ids):
            yield pack_examples(chosen)
            chosen, room = [], batch_tokens
        chosen.append(one)
        room -= len(one.ids)
    yield pack_examples(chosen)


class ExampleStream:
    """Training batches without end, shuffled anew each epoch, resumable at any batch.

    A batch takes examples in the order of the epoch for as long as they fit, and goes on into the
    next epoch, so that no batch is small because an epoch ends.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_tokens: int,
        seed: int,
        position: Position | None = None,
    ) -> None:
        """Start reading at `position`.

        Args:
            examples: none longer than `batch_tokens`.
            batch_tokens: tokens of a batch, at most.
            seed: of the order.
            position: where to go on; None starts from the beginning.
        """
        self._examples = examples
        self._batch_tokens = batch_tokens
        self._seed = seed
        self.position = position or Position()
        self._load_epoch()

    def _load_epoch(self) -> None:
        draw = np.random.default_rng([self._seed, self.position.epoch])
        self._order = draw.permutation(len(self._examples))

    def next(self) -> PackedBatch:
        """Return the next batch and move past it."""
        chosen: list[Example] = []
        room = self._batch_tokens
        while True:
            if self.position.piece == len(self._order):
                self.position = Position(self.position.epoch + 1)
                self._load_epoch()
            one = self._examples[self._order[self.position.piece]]
            if len(one.ids) > room:
                return pack_examples(chosen)
            chosen.append(one)
            room -= len(one.ids)
            self.position = Position(self.position.epoch, self.position.piece + 1)
