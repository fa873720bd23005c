"""Which box of a tensor a process holds, and how boxes of two divisions meet.

Knows numbers and plain tensors, and nothing of processes, models and files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """A box in a tensor, along every axis from an offset on.

    Attributes:
        shape: of the whole tensor.
        offset: where the box begins.
        size: of the box; it may be empty.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Place:
        """Return the box that is all of a tensor."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def num_values(self) -> int:
        """Values in the box."""
        return math.prod(self.size)

    @property
    def fits(self) -> bool:
        """Whether the box lies in the tensor."""
        return len(self.shape) == len(self.offset) == len(self.size) and all(
            at >= 0 and size >= 0 and (at + size <= whole or size == 0)
            for whole, at, size in zip(self.shape, self.offset, self.size, strict=True)
        )

    def divided(self, axis: int, count: int, number: int) -> Place:
        """Return one of `count` parts along an axis: equal ones, but for the last that has any.

        >>> [Place.whole([5]).divided(0, 3, number).size for number in range(3)]
        [(2,), (2,), (1,)]
        """
        length = self.size[axis]
        share = -(-length // count)
        first = min(share * number, length)
        offset, size = list(self.offset), list(self.size)
        offset[axis] += first
        size[axis] = min(share, length - first)
        return Place(self.shape, tuple(offset), tuple(size))

    def cut_from(self, whole: Tensor) -> Tensor:
        """Return the view of a whole tensor that is this box."""
        return whole[tuple(slice(at, at + n) for at, n in zip(self.offset, self.size, strict=True))]

    def overlap(self, other: Place) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Return what this box and another one share, as slices of each; None when nothing.

        >>> Place((8,), (0,), (5,)).overlap(Place((8,), (3,), (5,)))
        ((slice(3, 5, None),), (slice(0, 2, None),))
        """
        here, there = [], []
        for at, size, at_other, size_other in zip(
            self.offset, self.size, other.offset, other.size, strict=True
        ):
            first, end = max(at, at_other), min(at + size, at_other + size_other)
            if first >= end:
                return None
            here.append(slice(first - at, end - at))
            there.append(slice(first - at_other, end - at_other))
        return tuple(here), tuple(there)
