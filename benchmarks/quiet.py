"""Which samples count, and which of their medians may be quoted: the rules.

Other processes of this machine take a core: the kernel counts how long our threads waited for one,
and whose processor time was not ours. The host takes a core away: "stolen" time says so. Such
samples are thrown away.

A neighbour outside this machine slows the core itself (frequency, a shared pipeline). On a rented
machine there is always one, and no sample is without it; what is compared is therefore measured in
alternation, so that it meets both sides, and its effect is judged where it shows: in how far the
median of the samples, or of the ratios of neighbouring ones (`ratios.py`), is known at all. What is
not known to within a tenth may not be quoted.

Knows nothing of what is measured.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A median may be quoted when its interval reaches no further than this share from it.
STEADY = 0.10
# How often the true median lies in the interval.
CONFIDENCE = 0.9

# The most that others may take of the processor time there was, and that our threads may wait for
# a core of the time that passed.
OTHERS_SHARE = 0.03
# The kernel counts processor time in hundredths of a second, waiting in nanoseconds; threads always
# wait a moment when they are woken.
TICKS_SECONDS = 0.04
WAKING_SECONDS = 1e-4

# A block needs this many quiet samples, and at least this share of all that it took.
FEWEST_SAMPLES = 3
FEWEST_SHARE = 0.25

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Accounts:
    """Processor seconds since the machine started.

    Attributes:
        busy: of all processes on all cores; None where the system does not tell.
        stolen: that the host gave to somebody else.
        ours: of this process, its finished children and the named ones.
        waited: of each thread of this process and the named ones, waiting for a core.
    """

    busy: float | None
    stolen: float
    ours: float
    waited: Mapping[str, float]

    def others_until(self, later: Accounts) -> float:
        """Return the processor seconds that others and the host took between two readings."""
        others = later.stolen - self.stolen
        if self.busy is not None and later.busy is not None:
            others += max(0.0, later.busy - self.busy - (later.ours - self.ours))
        return others

    def waited_until(self, later: Accounts) -> float:
        """Return the seconds that our threads waited for a core between two readings."""
        return sum(
            seconds - self.waited.get(thread, 0.0) for thread, seconds in later.waited.items()
        )


def read_accounts(pids: Iterable[int] = (), proc: Path = PROC) -> Accounts:
    """Read the kernel's accounts.

    Args:
        pids: children that are still running and work for us.
        proc: where the kernel tells; elsewhere only the probes can witness.
    """
    own = os.times()
    ours = own.user + own.system + own.children_user + own.children_system
    try:
        fields = (proc / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        tick = 1 / os.sysconf("SC_CLK_TCK")
        named = [proc / str(pid) for pid in pids]
        ours += sum(_processor_seconds(folder / "stat", tick) for folder in named)
    except (OSError, ValueError):
        # Another operating system.
        return Accounts(None, 0.0, ours, {})
    waited = {}
    for folder in [proc / "self", *named]:
        for task in folder.glob("task/*/schedstat"):
            waited[str(task)] = _waited_seconds(task)
    user, nice, system, _, _, irq, soft_irq, stolen = (float(field) * tick for field in fields[:8])
    return Accounts(user + nice + system + irq + soft_irq, stolen, ours, waited)


def _processor_seconds(stat: Path, tick: float) -> float:
    # The name in parentheses may hold spaces; what follows it is numbers.
    fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (float(fields[11]) + float(fields[12])) * tick


def _waited_seconds(schedstat: Path) -> float:
    try:
        return 1e-9 * float(schedstat.read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        # The thread has ended meanwhile, or this kernel does not count.
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timing with what was seen around it.

    Attributes:
        seconds: what was measured.
        before: nanoseconds of one multiply-add just before it.
        after: the same just after it.
        others: processor seconds that other processes and the host took meanwhile.
        available: processor seconds that there were: cores times the wall clock.
        waited: seconds that threads of ours waited for a core.
    """

    seconds: float
    before: float
    after: float
    others: float
    available: float
    waited: float = 0.0

    def disturbance(self) -> str | None:
        """Say what spoiled this sample; None when nothing inside this machine did."""
        if self.waited > max(OTHERS_SHARE * self.seconds, WAKING_SECONDS):
            return f"its threads waited {self.waited:.3g} s for a core in {self.seconds:.3g} s"
        if self.others > max(OTHERS_SHARE * self.available, TICKS_SECONDS):
            return f"others took {self.others:.2f} of {self.available:.2f} processor seconds"
        return None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return between which two of `values` the true median lies, at `CONFIDENCE` or better.

    By ranks, so that nothing is assumed of how timings are distributed: the number of values below
    the median is binomial. Few values may not reach the confidence; then all of them are the
    interval.

    Source: the sign test's interval, e.g. Conover, Practical Nonparametric Statistics, section 3.2.

    >>> median_interval([5.0, 1.0, 9.0, 2.0, 3.0, 4.0, 8.0, 7.0])
    (2.0, 8.0)
    """
    ranked = sorted(values)
    count, outside, cut = len(ranked), 0.0, 0
    while cut < (count - 1) // 2:
        outside += 2 * math.comb(count, cut) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        cut += 1
    first = max(0, cut - 1)
    return ranked[first], ranked[count - 1 - first]


def unsteady(median: float, interval: tuple[float, float]) -> bool:
    """Say whether an interval reaches too far from its median for the number to be quoted."""
    return interval[1] > median * (1 + STEADY) or interval[0] < median / (1 + STEADY)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the samples of one thing that was measured.

    Attributes:
        raw: seconds of all samples, in the order they were taken.
        quiet: whether each of them was.
        interval: seconds between which the median of the quiet ones lies.
        multiply_adds: the shortest and the longest nanoseconds of one beside the samples.
        thrown_away: why, for each sample that was.
        disturbed: why not even a ratio of neighbouring samples may be quoted; None when it may.
        problem: why no number may be quoted; None when they may.
    """

    raw: tuple[float, ...]
    quiet: tuple[bool, ...]
    interval: tuple[float, float]
    multiply_adds: tuple[float, float]
    thrown_away: tuple[str, ...]
    disturbed: str | None
    problem: str | None

    @property
    def kept(self) -> tuple[float, ...]:
        """Seconds of the quiet samples."""
        return tuple(s for s, quiet in zip(self.raw, self.quiet, strict=True) if quiet)

    @property
    def seconds(self) -> float:
        """The median of the quiet samples; of all of them when too few are."""
        return statistics.median(self.kept if self.disturbed is None else self.raw)


def judge(samples: Sequence[Sample]) -> Verdict:
    """Decide which samples count, and whether their median may be quoted.

    Args:
        samples: all that were taken, at least one.
    """
    reasons = [sample.disturbance() for sample in samples]
    quiet = [sample for sample, why in zip(samples, reasons, strict=True) if why is None]
    others, available = sum(s.others for s in quiet), sum(s.available for s in quiet)
    disturbed = None
    if len(quiet) < FEWEST_SAMPLES or len(quiet) < FEWEST_SHARE * len(samples):
        disturbed = f"{len(quiet)} of {len(samples)} samples were quiet"
    elif others > max(OTHERS_SHARE * available, TICKS_SECONDS):
        # Too little to see in one short sample, and plain in their sum.
        disturbed = f"others took {others:.2f} of {available:.2f} processor seconds"
    counted = [one.seconds for one in (quiet if disturbed is None else samples)]
    interval, median = median_interval(counted), statistics.median(counted)
    problem = disturbed
    if problem is None and unsteady(median, interval):
        problem = (
            f"the median of {median:.3g} s lies between {interval[0]:.3g} and {interval[1]:.3g} s"
        )
    probes = [rate for sample in samples for rate in (sample.before, sample.after)]
    return Verdict(
        raw=tuple(sample.seconds for sample in samples),
        quiet=tuple(why is None for why in reasons),
        interval=interval,
        multiply_adds=(min(probes), max(probes)),
        thrown_away=tuple(why for why in reasons if why is not None),
        disturbed=disturbed,
        problem=problem,
    )
