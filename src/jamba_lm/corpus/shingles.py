"""Word sequences of a text as numbers: what near-duplicates and copied evaluations share.

Case, punctuation and spacing do not count. Knows no files. The numbers are the same on every
machine and in every process.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np

Numbers = np.ndarray[tuple[int], np.dtype[np.uint64]]

_WORD = re.compile(r"\w+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@lru_cache(maxsize=2**17)
def _word_number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def word_numbers(text: str) -> Numbers:
    """Return a number for each word of `text`, in order."""
    words = _WORD.findall(text.lower())
    return np.fromiter(map(_word_number, words), dtype=np.uint64, count=len(words))


def mixed(x: Numbers) -> Numbers:
    """Scatter numbers over all 64 bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    result: Numbers = x ^ (x >> np.uint64(31))
    return result


def shingles(words: Numbers, length: int) -> Numbers:
    """Return a number for each run of `length` words; none when there are fewer words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    # A polynomial in the position, so that the order of the words counts.
    total = words[:count].copy()
    for place in range(1, length):
        total = mixed(total * _GOLDEN + words[place : place + count])
    return mixed(total)
