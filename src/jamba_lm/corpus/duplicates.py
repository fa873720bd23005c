"""Which documents are copies of which: exactly by their hashes, nearly by their signatures.

The first document of a group stays. Knows arrays and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jamba_lm.corpus.minhash import NOTHING, band_numbers
from jamba_lm.corpus.recipe import DuplicatesSection

Array = np.ndarray[Any, np.dtype[Any]]
_PAIRS_AT_A_TIME = 2**16


def sort_keys(hashes: Array) -> tuple[Array, Array]:
    """Return the halves of 16-byte hashes as numbers that sort as the bytes do."""
    halves = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def exact_copies(hashes: Array) -> Array:
    """Return for each document the first one with the same hash: itself when it is the first."""
    high, low = sort_keys(hashes)
    order = np.lexsort((np.arange(len(high)), low, high))
    first = np.arange(len(high))
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(order) else np.array([], int)
    groups = np.cumsum(np.concatenate([[0], (~same).astype(np.int64)])) if len(order) else starts
    first[order] = order[starts[groups]] if len(order) else first
    return first


class Groups:
    """Documents joined pair by pair; the smallest number stands for its group."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)

    def first(self, one: int) -> int:
        """Return the smallest member of the group of `one`."""
        parents = self._parents
        root = one
        while parents[root] != root:
            root = int(parents[root])
        while parents[one] != root:
            parents[one], one = root, int(parents[one])
        return root

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        a, b = self.first(one), self.first(other)
        self._parents[max(a, b)] = min(a, b)

    def firsts(self) -> Array:
        """Return for each document the smallest member of its group."""
        return np.array([self.first(one) for one in range(len(self._parents))], dtype=np.int64)


def near_copies(signatures: Array, alive: Array, options: DuplicatesSection) -> Array:
    """Return for each document the first one of its group of near copies, perhaps itself.

    Documents that agree in all rows of a band are compared by their whole signatures; those whose
    estimated similarity reaches the threshold are joined, and so are copies of copies.

    Args:
        signatures: uint32 [documents, bands * rows].
        alive: bool [documents]; others are left alone.
        options: of the recipe.
    """
    groups = Groups(len(signatures))
    members = np.flatnonzero(alive & (signatures[:, 0] != NOTHING)) if len(signatures) else alive
    for band in range(options.bands):
        numbers = band_numbers(signatures[members], band, options.rows)
        order = np.argsort(numbers, kind="stable")
        numbers, ranked = numbers[order], members[order]
        same = numbers[1:] == numbers[:-1]
        if not same.any():
            continue
        # Each is compared with the first of its bucket and with the one before it.
        new = np.concatenate([[True], ~same])
        firsts = ranked[np.flatnonzero(new)[np.cumsum(new) - 1]]
        inside = np.flatnonzero(~new)
        pairs = np.concatenate(
            [
                np.stack([firsts[inside], ranked[inside]], axis=1),
                np.stack([ranked[inside - 1], ranked[inside]], axis=1),
            ]
        )
        for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
            some = pairs[start : start + _PAIRS_AT_A_TIME]
            alike = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
            for one, other in some[alike >= options.threshold].tolist():
                groups.join(one, other)
    return groups.firsts()
