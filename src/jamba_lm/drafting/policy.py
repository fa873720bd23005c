"""How many tokens to draft in the next call of the model, so that drafting pays or costs nothing.

A model that waits for its weights reads sixteen rows in nearly the time of one; a model that
fits into the cache does not. Text that is copied is guessed nearly always, free text now and then.
So times are measured (`call_times.py`) as well as hits (`acceptance.py`), and a draft is made as
long as gives the most tokens per second. Since measurements err, an account is kept beside them:
what drafts lose may never be more than a small share of the time spent.

Knows neither models nor tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jamba_lm.drafting.call_times import CallTimes

# Drafts are cut so that calls have one of these numbers of rows: each number is measured by itself,
# and libraries prepare themselves for each. Beyond the last, products of matrices are made in other
# ways, in which the result of a row may depend on how many there are; and a call for sixteen tokens
# leaves little to be gained.
ROWS = (2, 3, 4, 6, 8, 12, 16)
MOST_ROWS = ROWS[-1]
LONGEST_DRAFT = MOST_ROWS - 1
# A draft must promise this much more than none; less is within the error of what is known.
LEAST_GAIN = 1.03
# The account, in the time of a call without a draft: what it begins with, the share of every such
# call that is added, how much of what drafts gained is remembered, and the debt at which drafting
# pauses. A hundred calls with interest pay off a call's debt, and more than one is forgiven.
FIRST_CREDIT, INTEREST, MOST_CREDIT, MOST_DEBT = 1.0, 0.01, 8.0, 3.0
# What is added for a guess that came true though nothing was drafted: a text that came to be copied
# does not wait until the debts of what stood before are paid.
HIT_INTEREST = 0.1


class Wish(NamedTuple):
    """What one sequence has to do in the next call, and would like to try.

    Attributes:
        unread: tokens that it has to read: one, or more after a draft that failed.
        chances: how likely the first, the first two, ... drafted tokens are all accepted.
        fixed: draft this many whatever it costs, as far as there are rows; None to let the
            measurements decide.
        hits: guesses that came true lately without being drafted.
    """

    unread: int
    chances: Sequence[float] = ()
    fixed: int | None = None
    hits: int = 0


class DraftPolicy:
    """Chooses lengths of drafts, from what the calls so far took and gave."""

    def __init__(self) -> None:
        """Begin with nothing measured and a little credit."""
        self.times = CallTimes()
        self._credit_seconds: float | None = None

    def choose(self, wishes: Sequence[Wish]) -> list[int]:
        """Return how many tokens each sequence should draft in a call that they share.

        One after the other takes the length with which the call promises the most tokens per
        second. What is rejected has to be read again, and counts as time.
        """
        plain = len(wishes)
        hits = sum(wish.hits for wish in wishes)
        if hits and self._credit_seconds is not None:
            self._add(HIT_INTEREST * hits / plain, self.times.seconds(plain))
        rows = sum(wish.unread for wish in wishes)
        written = float(plain)
        counts = []
        for wish in wishes:
            if wish.fixed is not None:
                count = max(0, min(wish.fixed, MOST_ROWS - rows))
            elif wish.chances and self.times.knows(plain):
                count = self._best(wish, rows, written, plain)
            else:
                count = 0
            counts.append(count)
            rows += count
            written += sum(wish.chances[:count])
        return counts

    def _best(self, wish: Wish, rows: int, written: float, plain: int) -> int:
        without = self.times.seconds(rows)
        best, best_rate = 0, LEAST_GAIN * written / without
        # No draft takes less time than its first token: mostly that settles it.
        if written + sum(wish.chances) <= best_rate * self.times.seconds(rows + 1):
            return best
        reached, rejected_rows = 1.0, 0.0
        for count, chance in enumerate(wish.chances[: max(0, MOST_ROWS - rows)], start=1):
            written += chance
            # The draft ends before this token: all that was accepted is read again.
            rejected_rows += (reached - chance) * (wish.unread + count - 1)
            reached = chance
            if rows + count not in ROWS:
                continue
            seconds = self.times.seconds(rows + count)
            per_row = max(seconds - without, 0.0) / count
            worst = seconds - without + wish.unread * per_row
            # One that may not be tried says nothing of longer ones, whose cost may be known.
            if not self._may_try(rows + count, plain, worst):
                continue
            rate = written / (seconds + rejected_rows * per_row)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _may_try(self, rows: int, plain: int, worst_seconds: float) -> bool:
        """Say whether the account allows a draft, which at worst is for nothing."""
        credit = self._credit_seconds or 0.0
        if self.times.knows_around(rows, above=plain):
            return credit > -MOST_DEBT * self.times.seconds(plain)
        # What it costs is a guess: that has to be covered.
        return worst_seconds <= credit

    def observe(self, rows: int, seconds: float, *, sequences: int, written: int) -> None:
        """Note what a call took, and how many tokens its sequences wrote.

        Args:
            rows: rows of the call; as many as sequences when nothing was drafted or read again.
            seconds: the time it took.
            sequences: how many took part.
            written: tokens that they wrote, all together.
        """
        self.times.observe(rows, seconds)
        usual = self.times.seconds(sequences)
        if self._credit_seconds is None:
            self._credit_seconds = FIRST_CREDIT * usual
        if rows == sequences:
            self._add(INTEREST, usual)
        else:
            # The estimate and not the measurement: what disturbed a single call is not its fault.
            self._add(written / sequences - self.times.seconds(rows) / usual, usual)

    def _add(self, calls: float, usual: float) -> None:
        """Put the time of so many usual calls on the account, which has its limits."""
        credit = (self._credit_seconds or 0.0) + calls * usual
        self._credit_seconds = max(min(credit, MOST_CREDIT * usual), -(MOST_DEBT + 1) * usual)
