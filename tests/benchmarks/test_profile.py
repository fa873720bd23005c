"""The profile accounts for all of a step, and leaves the model as it was."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.module_timers import Parts, part_of, watched
from benchmarks.profile import Spent, phases, render, table_of
from benchmarks.quiet import Sample, judge
from jamba_lm.analysis.roofline import Call, model_work
from jamba_lm.errors import InputError
from jamba_lm.kernels import ops
from jamba_lm.kernels.part_times import PartTime
from jamba_lm.model.layout import plan_layers
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
    works = model_work(SMALL, Call(1, 1, 0), "bf16")
    known = {work.operation for work in works} | {"embedding"}
    named = dict(model.decoder.named_modules())
    found = {part_of(name, module) for name, module in named.items() if name != "head"}
    leaves = {
        part_of(name, module)
        for name, module in named.items()
        if not list(module.children()) and name != "head"
    }
    assert leaves <= known
    assert {"in_proj", "dt_proj", "qkv_proj", "o_proj", "router", "experts", "norms"} <= found
    assert all(part in known or part.startswith("glue of ") for part in found)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_of_a_step_add_up_to_the_step_and_the_model_stays_as_it_was(batch: int):
    model = shaken_model(SMALL)
    before = {name: getattr(ops, name) for name in ("selective_scan", "attention", "rms_norm")}
    expected = model.next_logits([[1, 2, 3]])
    operations = {work.operation for work in model_work(SMALL, Call(1, 1, 0), "bf16")}
    for phase in phases(model, batch, 24):
        seconds, parts = phase.parts(model)
        assert 0 < sum(part.seconds for part in parts.values()) <= seconds
        layers = plan_layers(SMALL)
        mamba = sum(layer.mixer == "mamba" for layer in layers)
        if phase.native:
            assert {"embedding", "in_proj", "scan", "attention", "experts", "head"} <= set(parts)
            assert all(part.seconds == part.detail.whole for part in parts.values())
            assert parts.keys() - {"embedding"} <= operations
        else:
            assert parts["scan"].calls == mamba * phase.repeats
            assert parts["head"].calls == phase.repeats
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
    phase = phases(shaken_model(SMALL), 1, 8)[1]
    parts = {"scan": Spent(phase.repeats * 30e-6, calls=2 * phase.repeats)}
    parts["glue of Block"] = Spent(phase.repeats * 10e-6, calls=4 * phase.repeats)
    taken = phase.repeats * 40e-6
    samples = [Sample(seconds=taken, before=0.2, after=0.2, others=0.0, available=1.0)] * 3
    verdicts = {"plain": judge(samples), "with timers": judge(samples)}
    rows = table_of(phase, verdicts, [parts] * 3, {"scan": 10e-6})
    text = render(phase, verdicts, rows)
    assert "| scan | 30.0 | 75.0 % | 10.0 | 3.0 | 2 |" in text
    assert "| glue of Block | 10.0 | 25.0 % | 0.0 |  | 4 |" in text
    assert "CONTAMINATED" not in text
    contaminated = {"plain": judge(samples[:1]), "with timers": judge(samples)}
    assert "CONTAMINATED" in render(phase, contaminated, rows)


def test_the_table_of_a_native_call_says_what_its_threads_did():
    phase = phases(shaken_model(SMALL), 1, 8)[2]
    detail = PartTime(20e-6, 5e-6, 0.0, 2e-6, 3e-6)
    samples = [Sample(seconds=40e-6, before=0.2, after=0.2, others=0.0, available=1.0)] * 3
    verdicts = {"plain": judge(samples), "with timers": judge(samples)}
    taken = [{"MLP": Spent(30e-6, detail=detail)}, {"MLP": Spent(30e-6, detail=detail)}, {}]
    text = render(phase, verdicts, table_of(phase, verdicts, taken, {"MLP": 15e-6}))
    assert (
        "of it cutting weights | of it cutting rows | of it giving results | of it waiting" in text
    )
    assert "| MLP | 30.0 | 75.0 % | 15.0 | 2.0 | 5.0 |  | 2.0 | 3.0 |" in text
    assert "| Python around all of these | 10.0 | 25.0 % | 0.0 |" in text


def test_a_model_that_no_native_step_reads_has_no_native_parts():
    model = shaken_model(SMALL, backend="reference")
    with pytest.raises(InputError, match="only native calls"):
        phases(model, 1, 8)[0].parts(model)
