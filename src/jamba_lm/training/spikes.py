"""When a loss is so far above the ones before it that something went wrong.

Knows numbers, and nothing of where they come from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Fewer losses than this tell nothing of what is usual.
FEWEST = 16
WINDOW = 64


def is_spike(loss: float, before: Sequence[float], threshold: float) -> bool:
    """Say whether `loss` lies more than `threshold` usual deviations above the median of `before`.

    The usual deviation is the median distance from the median, scaled to the standard deviation of
    a normal distribution; a few earlier spikes do not move it. At least one percent of the median
    is taken, so that a loss which hardly moves is not watched more closely than it is known.
    """
    if not math.isfinite(loss):
        return True
    if len(before) < FEWEST:
        return False
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(one - usual) for one in before)
    return loss > usual + threshold * max(deviation, 0.01 * abs(usual))


def remembered(loss: float, before: Sequence[float]) -> tuple[float, ...]:
    """Return the losses that the next one is compared with."""
    return (*before, loss)[-WINDOW:]
