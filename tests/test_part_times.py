"""A native call says where its time went: all of it, and to no part that it has not."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.part_times import PARTS, PartTime, PartTimes
from jamba_lm.language_model import LanguageModel
from jamba_lm.native_plan import NativePlan, timed
from jamba_lm.prefill import prefill
from jamba_lm.stepper import Stepper
from tests.arms import SMALL, random_ids, shaken_model
from tests.test_step_plan import plan_of

PATHS = loaded_library().paths_here
ONLY_MAMBA = SMALL.replace(attention_period=9, attention_offset=8, expert_period=9, expert_offset=8)
MIXERS = {"in_proj", "convolution", "x_proj", "dt_proj", "scan", "out_proj"}
ATTENTION = {"qkv_proj", "attention", "o_proj"}
AROUND = {"embedding", "norms", "head"}


def read(model: LanguageModel, plan: NativePlan, tokens: int, path: str | None = None) -> bytes:
    ids, states = [random_ids(model.config, tokens)], [model.new_state()]
    if tokens > 16:
        return prefill(plan, ids, states, [tokens - 1], path=path).tobytes()
    return plan.run(ids, states, [tokens - 1], path=path).tobytes()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parts_are_those_of_the_model_and_change_no_bit(tokens: int, dtype: str, path: str):
    for config, parts in (
        (SMALL, MIXERS | ATTENTION | AROUND | {"router", "MLP", "experts"}),
        (ONLY_MAMBA, MIXERS | AROUND | {"MLP"}),
    ):
        model = shaken_model(config, dtype=dtype)
        plan = plan_of(model)
        plain = read(model, plan, tokens, path)
        with timed(plan) as times:
            started = time.perf_counter()
            assert read(model, plan, tokens, path) == plain
            taken = time.perf_counter() - started
        found = times.parts()
        assert set(found) == parts
        assert sum(part.whole for part in found.values()) <= taken
        # Few rows meet weights as they lie, and results are where they belong at once.
        many = any(part.giving_results > 0 for part in found.values())
        assert many == any(part.cutting_weights > 0 for part in found.values()) == (tokens > 16)


def test_one_thread_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    model = shaken_model(SMALL)
    plan = plan_of(model)
    waited = {}
    for threads in (1, 2):
        monkeypatch.setattr(type(plan), "threads", threads)
        with timed(plan) as times:
            read(model, plan, 40)
        waited[threads] = sum(part.waiting for part in times.parts().values())
    assert waited[1] == 0 < waited[2]


def test_times_of_calls_add_up_until_they_are_cleared():
    model = shaken_model(SMALL)
    plan = plan_of(model)
    with timed(plan) as times:
        read(model, plan, 40)
        once = times.parts()
        read(model, plan, 1)
        twice = times.parts()
        assert all(twice[part].whole > once[part].whole for part in once)
        times.clear()
        assert times.parts() == {}
    read(model, plan, 1)
    assert times.parts() == {}


def test_a_stepper_made_meanwhile_tells_too():
    model = shaken_model(SMALL)
    plan = model.step_plan()
    assert isinstance(plan, NativePlan)
    with timed(plan) as times:
        Stepper(model).read([[1]], [1], [model.new_state()])
        assert "head" in times.parts()


def test_seconds_are_a_mean_over_threads():
    times = PartTimes(2)
    size = times.num_bytes // 8
    words = np.frombuffer((ctypes.c_int64 * size).from_address(times.address), dtype=np.int64)
    words[5:10] = 1e9, 0, 2e9, 0, 0
    words[size // 2 + 5 : size // 2 + 10] = 1e9, 0, 0, 4e9, 1e9
    assert times.parts() == {PARTS[1]: PartTime(1.0, 0.0, 1.0, 2.0, 0.5)}
    assert times.parts()[PARTS[1]].whole == 4.5
    words[size // 2 :] = 0
    assert times.parts() == {PARTS[1]: PartTime(1.0, 0.0, 2.0, 0.0, 0.0)}, "the other was idle"


def test_times_of_fewer_threads_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = shaken_model(SMALL)
    plan = plan_of(model)
    monkeypatch.setattr(type(plan), "threads", 1)
    with timed(plan):
        monkeypatch.setattr(type(plan), "threads", 2)
        for tokens in (1, 40):
            with pytest.raises(ValueError, match="2 threads have no room in the times of 1"):
                read(model, plan, tokens)
