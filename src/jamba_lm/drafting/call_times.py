"""How long a call of the model takes, by the number of its rows: measured while it works.

Knows neither the model nor a clock: it is told.
"""

from __future__ import annotations

from dataclasses import dataclass

# Disturbances make a call slower and never faster: an estimate follows a faster call at once and
# a slower one reluctantly, a single one not beyond twice itself. The first call of a size is
# believed up to four times of what was expected; every later one counts for less, down to a tenth.
TOWARDS_FASTER, TOWARDS_SLOWER, MOST_SLOWER, FIRST_MOST_SLOWER = 0.5, 0.1, 2.0, 4.0
# Estimates that were not confirmed in this many calls are forgotten: what disturbed them is over,
# and the context has grown. One that was seen a few times only lives shorter: the first calls after
# a prompt take twice as long as later ones, and drafts are tried among them.
LIFETIME_CALLS, LIFETIME_A_SIGHT = 256, 64
# Until two sizes of calls were seen: what a row more costs, as a share of a call.
ASSUMED_SLOPE = 0.1


@dataclass(slots=True)
class _Estimate:
    seconds: float
    times_seen: int
    last_seen: int


class CallTimes:
    """Estimates of the seconds of a call."""

    def __init__(self) -> None:
        """Know nothing."""
        self._by_rows: dict[int, _Estimate] = {}
        self._num_calls = 0

    def observe(self, rows: int, seconds: float) -> None:
        """Note that a call of this many rows took so long."""
        known = self._by_rows.get(rows)
        if known is None or not self.knows(rows):
            expected = self.seconds(rows) or seconds
            known = _Estimate(min(seconds, FIRST_MOST_SLOWER * expected), 0, 0)
            self._by_rows[rows] = known
        self._num_calls += 1
        known.times_seen += 1
        known.last_seen = self._num_calls
        share = max(TOWARDS_SLOWER, 1 / known.times_seen)
        if seconds < known.seconds:
            share = TOWARDS_FASTER
        known.seconds += share * (min(seconds, MOST_SLOWER * known.seconds) - known.seconds)

    def knows(self, rows: int) -> bool:
        """Say whether a call of exactly this many rows was seen lately."""
        known = self._by_rows.get(rows)
        if known is None:
            return False
        lifetime = min(LIFETIME_CALLS, LIFETIME_A_SIGHT * known.times_seen)
        return self._num_calls - known.last_seen < lifetime

    def knows_around(self, rows: int, *, above: int) -> bool:
        """Say whether calls of as many rows or fewer, but over `above`, and of more were seen."""
        sizes = [size for size in self._by_rows if size > above and self.knows(size)]
        return any(size <= rows for size in sizes) and any(size >= rows for size in sizes)

    def seconds(self, rows: int) -> float:
        """Return the expected time of a call: measured, or between the sizes that were.

        0 while nothing is known.
        """
        if self.knows(rows):
            return self._by_rows[rows].seconds
        sizes = [size for size in self._by_rows if self.knows(size)]
        fewer = max((size for size in sizes if size < rows), default=0)
        more = min((size for size in sizes if size > rows), default=0)
        if fewer and more:
            first, last = self._by_rows[fewer].seconds, self._by_rows[more].seconds
            # More rows never take less time; where they seem to, one of the two was disturbed.
            return first + max(last - first, 0.0) * (rows - fewer) / (more - fewer)
        if fewer:
            return self._by_rows[fewer].seconds * (1 + ASSUMED_SLOPE * (rows - fewer) / fewer)
        return self._by_rows[more].seconds if more else 0.0
