"""A trigram model of bytes, as strong as one can be: interpolated Kneser-Ney smoothing.

What the embedded model is compared with. Knows counts of byte triples and nothing else.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques (1998), section 3.1 and 4.1.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import torch

from jamba_lm.errors import DataError
from jamba_lm.tensor_file import TensorFile, write_tensors

Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Probabilities = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# What stands before the first byte of a document.
BEFORE = b"\n\n"


class ByteTrigram:
    """Probability of a byte after two others.

        p(c | a b) = max(n(abc) - D, 0) / n(ab) + D * types(ab) / n(ab) * q(c | b)

    where q is the same formula one order lower, over in how many different places a pair was seen
    instead of how often, and at the bottom every byte is as likely as any other.
    """

    def __init__(self, counts: Counts) -> None:
        """Fit the model to `counts`, of shape [256, 256, 256]: how often each triple was seen."""
        self.counts = counts
        pairs = (counts > 0).sum(0)
        singles = (pairs > 0).sum(0)
        uniform = np.full((1, 256), 1 / 256)
        one = _interpolate(singles[None], uniform)
        two = _interpolate(pairs, np.broadcast_to(one, (256, 256)))
        self._probability = _interpolate(
            counts.reshape(256 * 256, 256), np.tile(two, (256, 1))
        ).reshape(256, 256, 256)

    @classmethod
    def of_texts(cls, texts: Iterable[bytes]) -> Self:
        """Count the triples of many documents."""
        counts = np.zeros(256**3, dtype=np.int64)
        for text in texts:
            # A document at a time: a table of all triples is 128 MiB, and is not made for each.
            seen, times = np.unique(_triples(text), return_counts=True)
            counts[seen] += times
        return cls(counts.reshape(256, 256, 256))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged or not a table of triples.
        """
        with TensorFile(path, DataError) as file:
            if set(file.names) != {"triples", "counts"}:
                raise DataError(f"{str(path)!r} is not a table of byte triples")
            counts = np.zeros(256**3, dtype=np.int64)
            counts[file.tensor("triples").numpy()] = file.tensor("counts").numpy()
        return cls(counts.reshape(256, 256, 256))

    def save(self, path: Path) -> None:
        """Write the counts that are not zero."""
        flat = self.counts.reshape(-1)
        seen = np.flatnonzero(flat)
        tensors = {
            "triples": torch.from_numpy(seen.astype(np.int32)),
            "counts": torch.from_numpy(flat[seen].astype(np.int32)),
        }
        write_tensors(path, tensors, {"format": "byte triples: a * 65536 + b * 256 + c"})

    def bits(self, text: bytes) -> float:
        """Return the length of `text` as an arithmetic coder would write it with this model."""
        return float(-np.log2(self._probability.reshape(-1)[_triples(text)]).sum())


def _triples(text: bytes) -> Counts:
    """Number each byte of `text` together with the two before it."""
    values = np.frombuffer(BEFORE + text, dtype=np.uint8).astype(np.int64)
    return values[:-2] * 65536 + values[1:-1] * 256 + values[2:]


def _interpolate(counts: Counts, lower: Probabilities) -> Probabilities:
    """Smooth each row of `counts` with the row of `lower`; the discount is that of Ney et al."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once + twice else 0.5
    total = counts.sum(-1, keepdims=True)
    kept = np.maximum(counts - discount, 0)
    # What was taken away, and everything where nothing was ever seen, goes to the lower order.
    given = np.where(total > 0, discount * (counts > 0).sum(-1, keepdims=True), 1.0)
    return (kept + given * lower) / np.maximum(total, 1)
