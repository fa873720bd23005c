"""Where the time of native calls goes: by part of the model, and by what threads do there.

Needs no torch.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

# JAMBA_EMBEDDING .. of native/jamba_kernels.h.
PARTS = (
    "embedding",
    "norms",
    "in_proj",
    "convolution",
    "x_proj",
    "dt_proj",
    "scan",
    "out_proj",
    "qkv_proj",
    "attention",
    "o_proj",
    "router",
    "MLP",
    "experts",
    "head",
)
_ACTIVITIES = 5
_NANO = 1e-9


class PartTime(NamedTuple):
    """Seconds of one part, by what a thread does in it; the order is that of the library.

    Attributes:
        computing: all that is not below.
        cutting_weights: arranging weights for many rows.
        cutting_rows: arranging rows for a product, rounding them to 8 bits among it.
        giving_results: taking the results of a product of many rows to where they belong.
        waiting: for other threads, at the end of what they share.
    """

    computing: float
    cutting_weights: float
    cutting_rows: float
    giving_results: float
    waiting: float

    @property
    def whole(self) -> float:
        """Seconds of all of them."""
        return sum(self)


class PartTimes:
    """What calls add their times to.

    Measuring itself takes some 50 ns for each of a thread's turns from one part to the next.
    """

    def __init__(self, threads: int) -> None:
        """Begin with no time spent.

        Args:
            threads: that calls will compute with, at most.
        """
        self.threads = threads
        self._nanoseconds = array("q", bytes(8 * threads * len(PARTS) * _ACTIVITIES))

    @property
    def address(self) -> int:
        """Where the library writes, for as long as this object lives."""
        return self._nanoseconds.buffer_info()[0]

    @property
    def num_bytes(self) -> int:
        """How much the library may write there."""
        return len(self._nanoseconds) * self._nanoseconds.itemsize

    def clear(self) -> None:
        """Forget the times of all calls so far."""
        for index in range(len(self._nanoseconds)):
            self._nanoseconds[index] = 0

    def parts(self) -> dict[str, PartTime]:
        """Return seconds of the parts that took any, a mean over the threads that had work.

        Each of them is always somewhere, so the sum is the time that the calls took. A small model
        takes its steps with fewer threads than it was given.
        """
        size = len(PARTS) * _ACTIVITIES
        spent = self._nanoseconds
        worked = sum(any(spent[first : first + size]) for first in range(0, len(spent), size))
        found = {}
        for index, part in enumerate(PARTS):
            first = index * _ACTIVITIES
            time = PartTime(
                *(
                    _NANO * sum(spent[first + one :: size]) / max(1, worked)
                    for one in range(_ACTIVITIES)
                )
            )
            if time.whole > 0:
                found[part] = time
        return found


def spent_address(times: PartTimes | None, threads: int) -> int:
    """Return the `spent` of a call with so many threads: where its times go, or null."""
    if times is None:
        return 0
    if times.threads < threads:
        raise ValueError(f"{threads} threads have no room in the times of {times.threads}")
    return times.address
