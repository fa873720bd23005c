"""MinHash: a text's word sequences in a few numbers that agree as often as two texts overlap.

Broder, "On the resemblance and containment of documents" (1997). Knows no files.

The chance that one number of two signatures agrees is the Jaccard similarity of the two sets of
sequences. Documents that agree in all rows of a band become candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jamba_lm.corpus.recipe import DuplicatesSection
from jamba_lm.corpus.shingles import Numbers, mixed, shingles, word_numbers

Signature = np.ndarray[tuple[int], np.dtype[np.uint32]]
Signatures = np.ndarray[Any, np.dtype[Any]]

_SEED = 0x6A616D6261
# Sequences that are hashed at a time: a block of 112 hashes stays in the cache.
_BLOCK = 512
# The number of an empty set; a set of anything has it with a chance of 2^-32.
NOTHING = np.uint32(2**32 - 1)


class MinHash:
    """Computes signatures of `bands * rows` numbers."""

    def __init__(self, options: DuplicatesSection) -> None:
        self.ngram = options.ngram
        self.size = options.bands * options.rows
        draw = np.random.default_rng(_SEED)
        # Multiply-shift (Dietzfelbinger 1997): an odd factor and an offset, the upper half kept.
        self._factors = draw.integers(0, 2**64, self.size, dtype=np.uint64) | np.uint64(1)
        self._offsets = draw.integers(0, 2**64, self.size, dtype=np.uint64)

    def signature(self, text: str) -> Signature:
        """Return the signature of a text; all `NOTHING` when it has fewer words than a sequence."""
        return self.of_numbers(np.unique(shingles(word_numbers(text), self.ngram)))

    def of_numbers(self, numbers: Numbers) -> Signature:
        """Return the signature of a set of sequences."""
        smallest = np.full(self.size, NOTHING, dtype=np.uint32)
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            hashed = self._factors[:, None] * block[None, :] + self._offsets[:, None]
            least = (hashed >> np.uint64(32)).min(axis=1).astype(np.uint32)
            np.minimum(smallest, least, out=smallest)
        return smallest


def band_numbers(signatures: Signatures, band: int, rows: int) -> Numbers:
    """Return one number for each document that stands for all rows of a band."""
    part = signatures[:, band * rows : (band + 1) * rows].astype(np.uint64)
    total = np.full(len(part), band, dtype=np.uint64)
    for row in range(rows):
        total = mixed(total * np.uint64(0x100000001B3) + part[:, row])
    return total
