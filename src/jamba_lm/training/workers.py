"""Several passes at the same time, each on a copy of the model and its share of the CPU threads.

Threads inside one small matrix product wait for each other more than they compute; passes that know
nothing of each other do not. Knows neither losses nor data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from jamba_lm.model.decoder import Decoder

Work = TypeVar("Work")
Done = TypeVar("Done")
Item = TypeVar("Item")


class Workers:
    """Copies of a decoder, and a thread for each.

    Attributes:
        decoders: the one given first, then the copies.
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        """Make `count - 1` copies, and share the CPU threads out evenly when there are any.

        Args:
            decoder: works in the thread that calls `run`.
            count: how many passes run at the same time.
        """
        self.decoders = [decoder, *(copy.deepcopy(decoder) for _ in range(count - 1))]
        self._pool = None
        if count > 1:
            share = max(1, torch.get_num_threads() // count)
            torch.set_num_threads(share)
            # torch keeps the number of threads for each thread that calls it.
            self._pool = ThreadPoolExecutor(
                count - 1, "training", initializer=torch.set_num_threads, initargs=(share,)
            )

    def run(self, work: Callable[[Decoder, Work], Done], items: Sequence[Work]) -> list[Done]:
        """Return `work(decoder, item)` for each item, in order, each on a decoder of its own."""
        assert len(items) <= len(self.decoders)
        if self._pool is None:
            return [work(self.decoders[0], item) for item in items]
        others = [
            self._pool.submit(work, decoder, item)
            for decoder, item in zip(self.decoders[1:], items[1:], strict=False)
        ]
        first = work(self.decoders[0], items[0])
        return [first, *(other.result() for other in others)]

    def spread(self, work: Callable[[Item], Done], items: Sequence[Item]) -> list[Done]:
        """Return `work(item)` for each item, in order, the items shared out over the threads."""
        if self._pool is None:
            return [work(item) for item in items]
        size = len(self.decoders)

        def every(first: int) -> list[Done]:
            return [work(item) for item in items[first::size]]

        others = [self._pool.submit(every, first) for first in range(1, size)]
        shares = [every(0), *(other.result() for other in others)]
        return [shares[number % size][number // size] for number in range(len(items))]
