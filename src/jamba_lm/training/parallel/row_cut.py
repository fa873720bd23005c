"""Which rows of a packed batch each process of a context group holds, and what crosses the cuts.

Arithmetic on lengths. Documents may be cut anywhere: a piece that begins in the middle of one
continues from the process on the left.

M rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from jamba_lm.errors import DataError
from jamba_lm.model.batch import Batch
from jamba_lm.model.routing import RoutingLog
from jamba_lm.training.parallel.collectives import cut_evenly


@dataclass(frozen=True, slots=True)
class RowCut:
    """The contiguous cut of a batch's rows, as one process of the group sees it.

    Attributes:
        bounds: process k holds rows `bounds[k]:bounds[k + 1]` of the batch.
        starts: the row that each document begins at, and the end of the last.
        rank: of the process that looks.
    """

    bounds: tuple[int, ...]
    starts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, rank: int) -> RowCut:
        """Cut the rows of documents of these lengths into `size` even parts.

        Raises:
            DataError: there are fewer rows than processes.
        """
        starts = (0, *accumulate(lengths))
        if starts[-1] < size:
            raise DataError(
                f"a batch of {starts[-1]} tokens cannot be cut for parallel.context={size}: "
                "expected a token for every process at least; raise training.batch_tokens"
            )
        return cls(tuple(cut_evenly(starts[-1], size)), starts, rank)

    @property
    def first(self) -> int:
        """The first row held here."""
        return self.bounds[self.rank]

    @property
    def end(self) -> int:
        """The row past the last one held here."""
        return self.bounds[self.rank + 1]

    @property
    def longest(self) -> int:
        """Rows of the largest part."""
        return max(end - first for first, end in pairwise(self.bounds))

    def lengths(self) -> list[int]:
        """List the rows of each document's piece that is held here."""
        inside = [start for start in self.starts if self.first < start < self.end]
        ends = [self.first, *inside, self.end]
        return [end - first for first, end in pairwise(ends)]

    def document_of(self, row: int) -> int:
        """Return the row at which the document of `row` begins."""
        return self.starts[bisect_right(self.starts, row) - 1]

    @property
    def before(self) -> int:
        """Rows of the first piece's document that other processes hold, on the left."""
        return self.first - self.document_of(self.first)

    @property
    def crosses(self) -> bool:
        """Whether any document is cut at all: the same on every process."""
        return any(self.document_of(bound) != bound for bound in self.bounds[1:-1])

    def holders(self) -> range:
        """The processes that hold the `before` rows, from the left."""
        if not self.before:
            return range(self.rank, self.rank)
        begin = bisect_right(self.bounds, self.first - self.before) - 1
        return range(begin, self.rank)


@dataclass(frozen=True, slots=True)
class ContextBatch(Batch):
    """The pieces of documents that one process of a context group holds.

    Attributes:
        cut: where they lie in the whole batch.
    """

    cut: RowCut

    @classmethod
    def piece(
        cls, cut: RowCut, backend: str | None = None, routing: RoutingLog | None = None
    ) -> ContextBatch:
        """Describe what is held here as the sequences of one call."""
        lengths = tuple(cut.lengths())
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)
        return cls(lengths, offsets, None, backend, routing, cut)

    def positions(self) -> Tensor:
        """Return each row's position in its whole document, int64 of shape [M], on the CPU."""
        # A class with slots is made anew, which leaves super() without arguments behind.
        positions_M = Batch.positions(self)
        positions_M[: self.lengths[0]] += self.cut.before
        return positions_M
