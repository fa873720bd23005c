"""Which samples were taken on a quiet machine: the rule, and the accounts it is judged by.

Three things spoil a timing, and each has its own witness. Other processes of this machine take a
core: the kernel counts how long our threads waited for one, and whose processor time was not ours.
The host takes a core away: "stolen" time says so. A neighbour outside this machine slows the core
itself (frequency, a shared pipeline): the rate of multiply-adds just before and just after the
sample says so.

A run is judged as a whole by the same rate: where most samples of a block have to be thrown away,
or a block's own reference rate is not the run's, the block is called contaminated, and no number
of it may be quoted. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Rates of multiply-adds that differ by more than this share are of two different machines.
STEADY = 0.05

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

    def disturbance(self, reference: float) -> str | None:
        """Say what spoiled this sample; None when it was quiet.

        Args:
            reference: nanoseconds of a multiply-add when the machine is quiet.
        """
        if self.waited > max(OTHERS_SHARE * self.seconds, WAKING_SECONDS):
            return f"its threads waited {self.waited:.3g} s for a core in {self.seconds:.3g} s"
        if self.others > max(OTHERS_SHARE * self.available, TICKS_SECONDS):
            return f"others took {self.others:.2f} of {self.available:.2f} processor seconds"
        slower = max(self.before, self.after)
        if not agree(slower, reference):
            return f"a multiply-add took {slower:.4f} ns beside it, not {reference:.4f}"
        return None


def agree(one: float, other: float) -> bool:
    """Say whether two rates are of the same machine."""
    return abs(one - other) <= STEADY * min(one, other)


def reference_rate(samples: Sequence[Sample]) -> float:
    """Return the multiply-add time of the quiet machine, seen in some samples.

    The tenth part of the way from the fastest probe to the slowest: not the fastest one, which may
    be a moment of a higher frequency that nothing else had.
    """
    probes = sorted(rate for sample in samples for rate in (sample.before, sample.after))
    return probes[len(probes) // 10]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the samples of one block.

    Attributes:
        reference: nanoseconds of a multiply-add that the samples were held against.
        kept: seconds of the quiet samples, in the order they were taken.
        raw: seconds of all samples.
        quiet: whether each of them was.
        thrown_away: why, for each sample that was.
        problem: why no number of this block may be quoted; None when they may.
    """

    reference: float
    kept: tuple[float, ...]
    raw: tuple[float, ...]
    quiet: tuple[bool, ...]
    thrown_away: tuple[str, ...]
    problem: str | None

    @property
    def seconds(self) -> float:
        """The median of the quiet samples; of all of them in a contaminated block."""
        return statistics.median(self.kept if self.problem is None else self.raw)


def judge(samples: Sequence[Sample], run_reference: float | None = None) -> Verdict:
    """Decide which samples count, and whether the block may be quoted.

    Args:
        samples: all that were taken, at least one.
        run_reference: what earlier blocks of the same run found a multiply-add to take.
    """
    own = reference_rate(samples)
    reference = own if run_reference is None else min(own, run_reference)
    reasons = [sample.disturbance(reference) for sample in samples]
    quiet = [sample for sample, why in zip(samples, reasons, strict=True) if why is None]
    others, available = sum(s.others for s in quiet), sum(s.available for s in quiet)
    problem = None
    if run_reference is not None and not agree(own, reference):
        problem = (
            f"a multiply-add took {own:.4f} ns during this block and {reference:.4f} in the run"
        )
    elif len(quiet) < FEWEST_SAMPLES or len(quiet) < FEWEST_SHARE * len(samples):
        problem = f"{len(quiet)} of {len(samples)} samples were quiet"
    elif others > max(OTHERS_SHARE * available, TICKS_SECONDS):
        # Too little to see in one short sample, and plain in their sum.
        problem = f"others took {others:.2f} of {available:.2f} processor seconds"
    thrown_away = tuple(why for why in reasons if why is not None)
    return Verdict(
        reference=reference,
        kept=tuple(sample.seconds for sample in quiet),
        raw=tuple(sample.seconds for sample in samples),
        quiet=tuple(why is None for why in reasons),
        thrown_away=thrown_away,
        problem=problem,
    )
