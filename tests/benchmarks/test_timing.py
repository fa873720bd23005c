"""Samples are taken in turn, between probes, until enough are quiet or patience ends."""

from __future__ import annotations

import pytest

from benchmarks.calibration import probe
from benchmarks.engine_worker import random_ids
from benchmarks.prediction import medians, missed, speeds_of, table
from benchmarks.quiet import Accounts, Sample, judge
from benchmarks.selective_scan import by_scan, slots
from benchmarks.timing import Patience, SampleFailure, Stopwatch, timed


def test_what_is_compared_takes_turns_and_the_warm_up_does_not_count():
    order: list[str] = []

    def action(name: str, seconds: float):
        def run() -> float:
            order.append(name)
            return seconds

        return run

    said: list[str] = []
    watch = Stopwatch(threads=1, log=said.append)
    found = watch.alternate({"a": action("a", 1.0), "b": action("b", 2.0)}, Patience(50, 3, 60.0))
    assert order == ["a", "b"] * 4
    assert found["a"].raw == (1.0,) * 3
    assert found["b"].raw == (2.0,) * 3
    assert any("a: 1000 ms" in line for line in said), "the raw values are told"


def test_it_ends_when_the_ratios_are_known_although_the_speeds_are_not():
    speeds = iter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0] * 40)
    # Nobody else is there, whatever else this machine does meanwhile.
    watch = Stopwatch(
        threads=1, log=lambda text: None, accounts=lambda pids: Accounts(None, 0.0, 0.0, {})
    )
    actions = {"a": lambda: next(speeds), "b": lambda: 2 * next(speeds)}
    found = watch.alternate(actions, Patience(4, 50, 60.0), warm_up=0)
    assert len(found["a"].raw) == 4
    assert found["a"].problem is not None


def test_what_fails_leaves_the_comparison_and_the_others_go_on():
    def fails_after(samples: int):
        left = iter([1.0] * samples)

        def run() -> float:
            for seconds in left:
                return seconds
            raise SampleFailure("it is broken")

        return run

    watch = Stopwatch(threads=1, log=lambda text: None)
    failed: dict[str, str] = {}
    actions = {"a": lambda: 1.0, "b": fails_after(2), "c": fails_after(0)}
    found = watch.alternate(actions, Patience(50, 4, 60.0), failed=failed)
    assert list(found) == ["a"]
    assert len(found["a"].raw) == 4
    assert failed == {"b": "it is broken", "c": "it is broken"}
    for alone, where in ((actions, None), ({"c": actions["c"]}, {})):
        with pytest.raises(SampleFailure, match="it is broken"):
            watch.alternate(alone, Patience(50, 4, 60.0), failed=where)


def test_patience_ends():
    watch = Stopwatch(threads=1, log=lambda text: None)
    found = watch.alternate({"a": timed(lambda: None)}, Patience(50, 1000, 0.0))
    assert len(found["a"].raw) == 1
    assert found["a"].problem is not None


def test_a_probe_is_the_time_of_a_multiply_add():
    found = probe(1, rest_seconds=0.0)
    # From one at a time on a slow core to four at once on a fast one.
    assert 0.02 < found.own < 5.0
    assert found.wall > 0.02


def test_the_same_prompt_is_read_every_time():
    assert random_ids(100, 2, 5) == random_ids(100, 2, 5)
    assert all(0 <= one < 100 for ids in random_ids(100, 3, 50) for one in ids)


def test_times_of_scans_are_sorted_into_a_row_for_each():
    sample = Sample(seconds=1.0, before=0.2, after=0.2, others=0.0, available=2.0)
    verdict = judge([sample] * 3)
    assert by_scan({"avx2 forward": verdict, "avx2 forward+backward": verdict}, 10**9) == {
        "avx2": {"forward": 1.0, "forward+backward": 1.0}
    }


def test_predictions_are_held_against_measurements():
    answer = {
        "prediction": {phase: {"tokens_per_second": 90.0} for phase in ("prefill", "decode")},
        "prefill_tokens_per_second": {"median": 100.0},
        "decode_tokens_per_second": {"median": 60.0},
    }
    predicted, measured = speeds_of("predicted", answer), speeds_of("measured", answer)
    row = {"shape": "tiny", "type": "bf16", **medians([predicted], [measured])}
    assert "| tiny bf16 | prefill | 90.0 | 100.0 | 0.90 |" in table([{**row, "problem": None}])
    assert "| 1.50 |" in table([{**row, "problem": None}])
    assert "| [1.50] |" in table([{**row, "problem": "noise"}])
    assert missed([row]) == ["tiny bf16, decode"]


def test_a_prediction_is_held_against_the_measurement_of_its_own_minute():
    """A machine that slows down by half does so for both of a round."""
    predicted = [{"prefill": speed, "decode": speed} for speed in (100.0, 50.0, 60.0)]
    measured = [{"prefill": speed, "decode": 2 * speed} for speed in (100.0, 50.0, 40.0)]
    found = medians(predicted, measured)
    assert found["predicted"] == {"prefill": 60.0, "decode": 60.0}
    assert found["measured"] == {"prefill": 50.0, "decode": 100.0}
    assert found["ratio"] == {"prefill": 1.0, "decode": 0.5}


def test_a_scan_is_told_in_multiply_adds_of_the_same_minutes():
    result = {
        "fma_nanoseconds": {"avx2 forward": (0.1, 0.2), "avx2 forward+backward": (9.0, 9.0)},
        "nanoseconds_per_element": {"avx2": {"forward": 0.25, "forward+backward": 1.0}},
    }
    assert "0.1000 to 0.2000 ns" in slots(result, "avx2")
    assert "the time of 20.0 to 40.0 of them" in slots(result, "avx2")
