"""The profile accounts for all of a step, and leaves the model as it was."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.profile import NATIVE_STEP, Parts, part_of, phases, render, table_of, watched
from benchmarks.quiet import Sample, judge
from jamba_lm.analysis.roofline import Call, model_work
from jamba_lm.kernels import ops
from tests.arms import SMALL, shaken_model


def test_a_part_s_own_time_is_without_what_it_called():
    # A clock that says when each part begins and ends: a busy machine sleeps as long as it likes.
    parts = Parts(clock=iter([10.0, 12.0, 32.0, 33.0, 40.0, 44.0]).__next__)
    parts.enter("outer")
    parts.enter("inner")
    parts.leave()
    parts.leave()
    assert parts.seconds == {"inner": 20.0, "outer": 2.0 + 1.0}
    parts.enter("outer")
    parts.leave()
    assert parts.seconds == {"inner": 20.0, "outer": 7.0}


def test_time_is_that_of_the_clock():
    parts = Parts()
    parts.enter("part")
    time.sleep(0.002)
    parts.leave()
    assert parts.seconds["part"] >= 0.002


def test_an_operation_within_its_own_part_is_one_call():
    parts = Parts()
    for _ in range(3):
        parts.enter("norms")
        parts.enter("norms")
        parts.leave()
        parts.leave()
    assert parts.calls == {"norms": 3}


def test_every_module_belongs_to_a_part_of_the_roofline_or_is_glue():
    model = shaken_model(SMALL)
    known = {work.part for work in model_work(SMALL, Call(1, 1, 0), "bf16")} | {"embedding"}
    named = dict(model.decoder.named_modules())
    found = {part_of(name, module) for name, module in named.items() if name != "head"}
    leaves = {
        part_of(name, module)
        for name, module in named.items()
        if not list(module.children()) and name != "head"
    }
    assert leaves <= known
    assert {"Mamba projections", "attention projections", "router", "experts", "norms"} <= found
    assert all(part in known or part.startswith("glue of ") for part in found)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_of_a_step_add_up_to_the_step_and_the_model_stays_as_it_was(batch: int):
    model = shaken_model(SMALL)
    before = {name: getattr(ops, name) for name in ("selective_scan", "attention", "rms_norm")}
    expected = model.next_logits([[1, 2, 3]])
    for phase in phases(model, batch, 24):
        parts = Parts()
        seconds = phase.seconds(model, parts)
        inside = sum(parts.seconds.values())
        assert 0 < inside <= seconds
        steps = parts.calls[NATIVE_STEP] + parts.calls["head"]
        assert steps == phase.repeats, "a step is one native call, or all of its modules"
        assert (parts.calls["scan"] > 0) == (parts.calls["head"] > 0)
    assert {name: getattr(ops, name) for name in before} == before
    assert not any(module._forward_hooks for module in model.decoder.modules())
    assert torch.equal(model.next_logits([[1, 2, 3]]), expected)


def test_a_failure_takes_the_timers_off_again():
    model = shaken_model(SMALL)
    scan = ops.selective_scan
    with pytest.raises(ZeroDivisionError), watched(model, Parts()):
        raise ZeroDivisionError
    assert ops.selective_scan is scan
    assert not any(module._forward_hooks for module in model.decoder.modules())


def test_the_table_shows_shares_and_how_often_the_floor_fits():
    model = shaken_model(SMALL)
    phase = phases(model, 1, 8)[2]
    parts = Parts()
    parts.seconds["scan"], parts.calls["scan"] = 30e-6, 2
    parts.seconds["glue of Block"], parts.calls["glue of Block"] = 10e-6, 4
    samples = [Sample(seconds=40e-6, before=0.2, after=0.2, others=0.0, available=1.0)] * 3
    verdicts = {"plain": judge(samples), "with timers": judge(samples)}
    rows = table_of(phase, verdicts, [parts] * 3, {"scan": 10e-6})
    text = render(phase, verdicts, rows)
    assert "| scan | 2 | 30.0 | 75.0 % | 10.0 | 3.0 |" in text
    assert "| glue of Block | 4 | 10.0 | 25.0 % | 0.0 |  |" in text
    assert "CONTAMINATED" not in text
    contaminated = {"plain": judge(samples[:1]), "with timers": judge(samples)}
    assert "CONTAMINATED" in render(phase, contaminated, rows)
