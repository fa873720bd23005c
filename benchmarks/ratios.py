"""How many times faster one thing is than another, from samples taken in turn.

A neighbour on the host changes the speed of the machine from second to second. The ratio of two
samples that were taken one after the other loses most of that; the median of such ratios is what
may be quoted, when it is known closely enough. Knows nothing of what is measured.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.quiet import FEWEST_SAMPLES, Verdict, median_interval, unsteady


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of one thing over that of another.

    Attributes:
        median: of the ratios of samples of the same round, both of them quiet.
        interval: between which the true median lies.
        pairs: how many ratios there were.
        problem: why it may not be quoted; None when it may.
    """

    median: float
    interval: tuple[float, float]
    pairs: int
    problem: str | None


def paired(theirs: Verdict, ours: Verdict) -> Ratio:
    """Return how many times the time of `ours` that of `theirs` is.

    Args:
        theirs: samples of one thing.
        ours: as many of another, taken in the same rounds.
    """
    rounds = list(zip(theirs.raw, ours.raw, theirs.quiet, ours.quiet, strict=True))
    both = [their / our for their, our, one, other in rounds if one and other]
    disturbed = theirs.disturbed or ours.disturbed
    if disturbed is None and len(both) < FEWEST_SAMPLES:
        disturbed = f"both samples of {len(both)} rounds were quiet"
    ratios = both if disturbed is None else [their / our for their, our, _, _ in rounds]
    median, interval = statistics.median(ratios), median_interval(ratios)
    problem = disturbed
    if problem is None and unsteady(median, interval):
        problem = f"the ratio of {median:.3g} lies between {interval[0]:.3g} and {interval[1]:.3g}"
    return Ratio(median, interval, len(ratios), problem)
