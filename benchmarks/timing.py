"""Timings taken in alternation, each between two probes of the machine, until enough were quiet.

What is compared is measured side by side: one sample of each in turn, so that a machine that
changes its speed changes it for all of them. It decides nothing itself; `quiet.py` holds the rules.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from benchmarks.calibration import probe
from benchmarks.quiet import Accounts, Sample, Verdict, judge, read_accounts
from benchmarks.ratios import paired

Answer = TypeVar("Answer")
# Returns the seconds that one repetition took, by the clock of whoever did it.
Action = Callable[[], float]


class SampleFailure(Exception):
    """A sample could not be taken; the message says why."""


@dataclass(slots=True)
class Patience:
    """How long to try.

    Attributes:
        wanted: quiet samples of everything.
        most: samples of anything.
        seconds: after which no new round begins.
    """

    wanted: int = 7
    most: int = 40
    seconds: float = 60.0


def settled(verdicts: Mapping[str, Verdict], wanted: int) -> bool:
    """Say whether all may be quoted: as ratios to the first, or alone where it is alone."""
    first, *others = verdicts.values()
    if any(len(verdict.kept) < wanted for verdict in verdicts.values()):
        return False
    if not others:
        return first.problem is None
    return all(paired(other, first).problem is None for other in others)


def to_stderr(text: str) -> None:
    """Print beside the result."""
    print(text, file=sys.stderr, flush=True)


def no_processes() -> Iterable[int]:
    """Name no process: all the work is done in this one."""
    return ()


@dataclass(slots=True)
class Stopwatch:
    """Takes samples of several things in turn.

    Attributes:
        threads: that the work uses, and so the probe.
        pids: the processes that work for us at this moment.
        log: what tells a person.
        accounts: reads what the processor's time went to, given those processes.
    """

    threads: int
    pids: Callable[[], Iterable[int]] = no_processes
    log: Callable[[str], None] = to_stderr
    accounts: Callable[[Iterable[int]], Accounts] = read_accounts

    def alternate(
        self,
        actions: Mapping[str, Action],
        patience: Patience,
        warm_up: int = 1,
        failed: dict[str, str] | None = None,
    ) -> dict[str, Verdict]:
        """Take samples of all actions in turn, until they are `settled` or patience ends.

        Args:
            actions: what is compared, by name; the first one is what the others are held against.
            patience: how long to try.
            warm_up: rounds that do not count.
            failed: gets the name of each action that raised `SampleFailure`, and why. It leaves the
                comparison with all its samples; the others go on. Without it they do not.

        Raises:
            SampleFailure: an action did, and there is no `failed`; or none of them is left.
        """
        samples: dict[str, list[Sample]] = {name: [] for name in actions}

        def leave(name: str, failure: SampleFailure) -> None:
            if failed is None or len(samples) == 1:
                raise failure
            self.log(f"  {name}: failed, and is left out: {failure}")
            failed[name] = str(failure)
            del samples[name]

        for _ in range(warm_up):
            for name in list(samples):
                try:
                    actions[name]()
                except SampleFailure as failure:
                    leave(name, failure)
        started = time.monotonic()
        rate = probe(self.threads).wall
        while True:
            for name in list(samples):
                try:
                    sample, rate = self._sample(actions[name], rate)
                except SampleFailure as failure:
                    leave(name, failure)
                else:
                    samples[name].append(sample)
            verdicts = {name: judge(taken) for name, taken in samples.items()}
            taken = len(next(iter(samples.values())))
            if settled(verdicts, patience.wanted) or taken >= patience.most:
                break
            if time.monotonic() - started > patience.seconds:
                break
        self._tell(verdicts)
        return verdicts

    def observe(self, action: Callable[[], Answer]) -> tuple[Answer, Sample]:
        """Do something between two probes; return what it returned, and what was seen around it."""
        rate = probe(self.threads).wall
        return self._observe(action, rate)

    def _sample(self, action: Action, before: float) -> tuple[Sample, float]:
        seconds, sample = self._observe(action, before)
        sample = replace(sample, seconds=seconds)
        return sample, sample.after

    def _observe(self, action: Callable[[], Answer], before: float) -> tuple[Answer, Sample]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        accounts, started = self.accounts(self.pids()), time.monotonic()
        answer = action()
        wall, later = time.monotonic() - started, self.accounts(self.pids())
        sample = Sample(
            seconds=wall,
            before=before,
            after=probe(self.threads).wall,
            others=accounts.others_until(later),
            available=cores * wall,
            waited=accounts.waited_until(later),
        )
        return answer, sample

    def _tell(self, verdicts: Mapping[str, Verdict]) -> None:
        for name, verdict in verdicts.items():
            raw = " ".join(f"{1e3 * seconds:.4g}" for seconds in verdict.raw)
            kept = f"{len(verdict.kept)} of {len(verdict.raw)} samples quiet"
            self.log(f"  {name}: {1e3 * verdict.seconds:.4g} ms, {kept}; all, in ms: {raw}")
            if verdict.disturbed is not None:
                worst = verdict.thrown_away[-1] if verdict.thrown_away else verdict.disturbed
                self.log(f"  {name}: CONTAMINATED: {verdict.disturbed} (the last one: {worst})")
            elif verdict.problem is not None:
                self.log(f"  {name}: unsteady: {verdict.problem}")


def timed(action: Callable[[], object]) -> Action:
    """Return an action that times `action` by the clock on the wall."""

    def run() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    return run
