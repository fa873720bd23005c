"""What one process must know of the others to compute its part of a step.

Knows sums and readers, and neither models nor files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.processes import Processes


class Together:
    """Which documents a process reads, and sums and maxima over all processes.

    Processes that work on the same rows (parallel.tensor) find the same; of them one counts. Those
    that share the rows of a batch (parallel.context) read the same batches, and count their rows.

    Attributes:
        processes: of the run.
        layout: how they share the work.
        reader: whose batches this process reads.
        readers: how many read different ones.
    """

    def __init__(self, processes: Processes, layout: ParallelLayout) -> None:
        """Find this process' place in a layout that fits the number of processes."""
        self.processes = processes
        self.layout = layout
        self.reader = layout.reader(processes.rank)
        self.readers = layout.num_readers
        places = [layout.coordinates(rank) for rank in range(layout.world_size)]
        self._counting = [rank for rank, one in enumerate(places) if one["tensor"] == 0]
        here = places[processes.rank]
        self._same_pass = [
            rank
            for rank in self._counting
            if all(places[rank][axis] == here[axis] for axis in ("replicate", "shard"))
        ]

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        return self.processes.device

    def collected(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all processes that count, each kind of row once."""
        found = self.processes.gather(numbers)
        return [found[rank] for rank in self._counting]

    def add_up(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the numbers that all processes found, correctly rounded."""
        return [math.fsum(column) for column in zip(*self.collected(numbers), strict=True)]

    def add_up_tensor(self, counts: Tensor) -> Tensor:
        """Return the sum of whole numbers, float32 of any shape, over all processes."""
        summed = self.add_up(counts.flatten().tolist())
        return torch.tensor(summed, dtype=counts.dtype, device=counts.device).view_as(counts)

    def add_up_of_pass(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over those processes that share the rows of one batch.

        All processes call it, as often as each other.
        """
        if self.layout.context == 1:
            return list(numbers)
        found = self.processes.gather(numbers)
        columns = zip(*(found[rank] for rank in self._same_pass), strict=True)
        return [math.fsum(column) for column in columns]

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Return the largest of the numbers that any process found."""
        return [max(column) for column in zip(*self.processes.gather(numbers), strict=True)]


ALONE = Together(Processes(), ParallelLayout())
