"""Where the last tokens of a sequence stood before: an index that grows with the sequence.

Knows neither models nor what is done with a match.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

# Tokens that are remembered, a power of two: 12 bytes each, and one MiB for the tables of hashes.
WINDOW = 2**18
# Matches are looked for through the last LONG tokens, and where there is none the last SHORT. Two
# lengths, because a frequent pair occurs more often than a bounded number of places reaches back,
# while five tokens in a row are nearly unique.
LONG, SHORT = 5, 2
PLACES_TRIED = 8
# A match is not measured further than this when it is found; while it goes on, it grows.
LONGEST_MEASURED = 32
HASHES = 2**17 - 1


class Match(NamedTuple):
    """An earlier place whose tokens are the last ones of the sequence.

    Attributes:
        start: the place of the token that followed there.
        length: how many tokens agree.
    """

    start: int
    length: int


class SuffixIndex:
    """The tokens of a sequence, and the longest of its ends that stood in it before.

    Chains of places with equal hashes, as in LZ77 compressors: a token costs about a microsecond
    and 12 bytes, whatever came before, and the memory is bounded by the window. A suffix automaton
    would find the longest match where this one tries the PLACES_TRIED latest places only, at many
    times the memory.
    """

    def __init__(self, ids: Iterable[int] = (), *, window: int = WINDOW) -> None:
        """Begin with `ids`; `window` is a power of two."""
        assert window & (window - 1) == 0, window
        self._window = window
        self._mask = window - 1
        self._ids = array("i")
        self._long, self._short = _Chains(), _Chains()
        self._tail: tuple[int, ...] = ()
        # The longest match, once it was looked for.
        self._match: Match | None = None
        self._searched = True
        self.num_tokens = 0
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens at the end."""
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token at the end."""
        # The longest match, where it goes on, is the longest match again: a longer one elsewhere
        # would have been longer before.
        match, place, mask = self._match, self.num_tokens, self._mask
        if match is not None and self._ids[match.start & mask] == token:
            self._match = Match(match.start + 1, match.length + 1)
        else:
            self._match, self._searched = None, False
        self._tail = tail = (*self._tail[1 - LONG :], token)
        long, short = hash(tail) & HASHES, hash(tail[-SHORT:]) & HASHES
        if place <= mask:
            self._ids.append(token)
            self._long.before.append(self._long.latest[long])
            self._short.before.append(self._short.latest[short])
        else:
            self._ids[place & mask] = token
            self._long.before[place & mask] = self._long.latest[long]
            self._short.before[place & mask] = self._short.latest[short]
        self._long.latest[long] = self._short.latest[short] = place
        self.num_tokens = place + 1

    def __getitem__(self, place: int) -> int:
        return self._ids[place & self._mask]

    def find(self) -> Match | None:
        """Return where the last tokens stood before: the longest match, of equal ones the latest.

        None when not even the last SHORT tokens did.
        """
        if not self._searched:
            self._match = self._search(self._long, LONG) or self._search(self._short, SHORT)
            self._searched = True
        if self._match is not None and self._match.start <= self.num_tokens - self._window:
            # What was matched has left the window.
            self._match = None
        return self._match

    def following(self, match: Match, count: int) -> list[int]:
        """Return the `count` tokens that followed a match.

        One that reaches the end goes on with its own beginning: the sequence repeats itself then.
        """
        period = self.num_tokens - match.start
        first = [self[match.start + place] for place in range(min(count, period))]
        while len(first) < count:
            first.append(first[len(first) - period])
        return first

    def _search(self, chains: _Chains, shortest: int) -> Match | None:
        ids, mask, last = self._ids, self._mask, self.num_tokens - 1
        oldest = max(self.num_tokens - self._window, 0)
        best = None
        longest = shortest - 1
        place = chains.before[last & mask]
        for _ in range(PLACES_TRIED):
            if place < oldest:
                break
            # A place that cannot win is known by the one token that it would have to have.
            reach = place - longest
            if reach >= oldest and ids[reach & mask] == ids[(last - longest) & mask]:
                length = 0
                limit = min(LONGEST_MEASURED, place - oldest + 1)
                while (
                    length < limit and ids[(place - length) & mask] == ids[(last - length) & mask]
                ):
                    length += 1
                if length > longest:
                    best, longest = Match(place + 1, length), length
                    if length == LONGEST_MEASURED:
                        break
            place = chains.before[place & mask]
        return best


class _Chains:
    """Places by the hash of the tokens that end there: the latest, and the one before each."""

    __slots__ = ("before", "latest")

    def __init__(self) -> None:
        self.latest = array("i", [-1]) * (HASHES + 1)
        self.before = array("i")
