"""What counts as a quiet machine: each witness alone, and the verdict on a block."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quiet import (
    CONFIDENCE,
    FEWEST_SAMPLES,
    STEADY,
    Accounts,
    Sample,
    judge,
    median_interval,
    read_accounts,
    unsteady,
)
from benchmarks.ratios import paired

QUIET = Sample(seconds=1.0, before=0.20, after=0.20, others=0.0, available=2.0)


def block(*samples: Sample) -> list[Sample]:
    return list(samples)


def test_a_quiet_block_is_kept_whole():
    verdict = judge([replace(QUIET, seconds=seconds) for seconds in (1.0, 1.04, 1.02)])
    assert verdict.problem is None
    assert verdict.kept == (1.0, 1.04, 1.02)
    assert verdict.seconds == 1.02
    assert verdict.interval == (1.0, 1.04)
    assert verdict.thrown_away == ()


@pytest.mark.parametrize(
    ("disturbed", "word"),
    [
        (replace(QUIET, seconds=9.0, others=0.1), "others took"),
        (replace(QUIET, seconds=9.0, waited=0.5), "waited"),
    ],
)
def test_a_disturbed_sample_is_thrown_away_with_its_reason(disturbed: Sample, word: str):
    verdict = judge([QUIET, disturbed, QUIET, QUIET, QUIET, QUIET])
    assert verdict.problem is None
    assert verdict.seconds == 1.0
    assert verdict.quiet == (True, False, True, True, True, True)
    assert len(verdict.thrown_away) == 1
    assert word in verdict.thrown_away[0]


def test_the_clock_of_the_kernel_is_coarse_and_a_short_sample_may_show_a_tick():
    short = replace(QUIET, seconds=0.01, available=0.02, others=0.02)
    assert short.disturbance() is None
    assert replace(short, others=0.05).disturbance() is not None


def test_what_no_short_sample_shows_is_seen_in_their_sum():
    short = replace(QUIET, seconds=0.01, available=0.02, others=0.01)
    verdict = judge([short] * 20)
    assert verdict.problem is not None
    assert "others took 0.20 of 0.40" in verdict.problem


@pytest.mark.parametrize("quiet", range(FEWEST_SAMPLES))
def test_too_few_quiet_samples_contaminate_the_block(quiet: int):
    verdict = judge([QUIET] * quiet + [replace(QUIET, seconds=5.0, others=1.0)] * 4)
    assert verdict.problem == f"{quiet} of {quiet + 4} samples were quiet"
    assert verdict.seconds == 5.0 or quiet > 1, "a contaminated block shows all of its samples"


def test_a_median_that_is_not_known_may_not_be_quoted_and_is_no_disturbance():
    verdict = judge([replace(QUIET, seconds=seconds) for seconds in (1.0, 1.5, 1.2)])
    assert verdict.disturbed is None
    assert verdict.problem == "the median of 1.2 s lies between 1 and 1.5 s"


def test_a_neighbour_on_the_host_is_told_of():
    verdict = judge([QUIET, replace(QUIET, before=0.31), replace(QUIET, after=0.18)])
    assert verdict.multiply_adds == (0.18, 0.31)
    assert verdict.problem is None


def test_a_machine_that_changes_its_speed_leaves_the_ratio():
    speeds = [1.0, 2.0, 1.4, 3.0, 1.1, 2.5]
    ours = judge([replace(QUIET, seconds=speed) for speed in speeds])
    theirs = judge([replace(QUIET, seconds=3.0 * speed) for speed in speeds])
    assert ours.problem is not None
    ratio = paired(theirs, ours)
    assert ratio.problem is None
    assert ratio.median == pytest.approx(3.0)
    assert ratio.pairs == 6


def test_a_ratio_of_disturbed_samples_is_left_out_and_one_that_changes_is_refused():
    ours = judge([QUIET] * 6)
    disturbed = replace(QUIET, seconds=9.0, others=1.0)
    theirs = judge([replace(QUIET, seconds=2.0)] * 5 + [disturbed])
    assert paired(theirs, ours).interval == (2.0, 2.0)
    assert paired(theirs, ours).pairs == 5
    wild = judge([replace(QUIET, seconds=seconds) for seconds in (1.0, 2.0, 3.0, 1.0, 2.0, 3.0)])
    assert paired(wild, ours).problem is not None
    assert "lies between 1 and 3" in str(paired(wild, ours).problem)
    spoilt = judge([disturbed] * 6)
    assert paired(ours, spoilt).problem == spoilt.disturbed


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_the_median_lies_in_its_interval(values: list[float]):
    low, high = median_interval(values)
    assert low <= statistics.median(values) <= high
    assert {low, high} <= set(values)


@pytest.mark.parametrize("count", [7, 12, 25])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count: int):
    draw = random.Random(count)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(count)])
        hits += low <= math.log(2) <= high
    # The rank interval is never below its confidence; 2,000 draws are off by two points at most.
    assert hits / 2000 > CONFIDENCE - 0.02
    assert hits / 2000 < 0.99


def test_a_tenth_is_what_may_be_quoted():
    assert not unsteady(1.0, (1.0, 1 + STEADY))
    assert unsteady(1.0, (1.0, 1 + 1.1 * STEADY))
    assert unsteady(1.0, (1 - 1.1 * STEADY, 1.0))


@given(
    st.lists(
        st.builds(
            Sample,
            seconds=st.floats(1e-3, 10.0),
            before=st.floats(0.1, 0.5),
            after=st.floats(0.1, 0.5),
            others=st.floats(0.0, 2.0),
            available=st.floats(1e-3, 20.0),
            waited=st.floats(0.0, 2.0),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_every_sample_is_kept_or_explained(samples: list[Sample]):
    verdict = judge(samples)
    assert len(verdict.kept) + len(verdict.thrown_away) == len(samples) == len(verdict.raw)
    assert sum(verdict.quiet) == len(verdict.kept)
    assert min(verdict.raw) <= verdict.seconds <= max(verdict.raw)


def test_the_accounts_of_the_kernel_are_read_and_subtracted(tmp_path: Path):
    (tmp_path / "stat").write_text("cpu  100 10 40 900 5 6 4 20 0 0\ncpu0 1\n", encoding="ascii")
    before = read_accounts(proc=tmp_path)
    (tmp_path / "stat").write_text("cpu  300 10 40 900 5 6 4 70 0 0\ncpu0 1\n", encoding="ascii")
    after = read_accounts(proc=tmp_path)
    assert before.busy == pytest.approx(1.6)
    took = before.others_until(after)
    # Two seconds were busy and half a second stolen; this process used next to nothing of them.
    assert 2.0 < took <= 2.5


def test_processor_time_of_the_processes_that_work_for_us_is_not_others(tmp_path: Path):
    (tmp_path / "stat").write_text("cpu  100 0 0 0 0 0 0 0\n", encoding="ascii")
    (tmp_path / "7" / "task" / "8").mkdir(parents=True)
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) S {'0 ' * 10}50 25 0 0\n", encoding="ascii")
    (tmp_path / "7" / "task" / "8" / "schedstat").write_text("5 2000000000 3\n", encoding="ascii")
    found = read_accounts([7], proc=tmp_path)
    assert found.ours - read_accounts([], proc=tmp_path).ours == pytest.approx(0.75, abs=0.05)
    assert sum(found.waited.values()) == 2.0


def test_a_thread_that_is_new_has_waited_since_it_began():
    before = Accounts(1.0, 0.0, 0.0, {"a": 1.0})
    assert before.waited_until(Accounts(1.0, 0.0, 0.0, {"a": 1.5, "b": 0.25})) == 0.75


def test_a_system_without_accounts_leaves_it_to_the_probes(tmp_path: Path):
    nothing = read_accounts(proc=tmp_path / "absent")
    assert nothing.busy is None
    assert nothing.others_until(nothing) == 0.0
