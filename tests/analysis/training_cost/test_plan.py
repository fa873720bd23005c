"""A plan fits or is refused with what would, and its parts are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jamba_lm.analysis.memory import GIB
from jamba_lm.analysis.training_cost.devices import DEVICES
from jamba_lm.analysis.training_cost.plan import Run, TrainingPlan, best_on, search
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError, InputError
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.presets import preset
from jamba_lm.training.utilization import training_flops

V01 = Run(
    config=JambaConfig(),
    device=DEVICES["h100"],
    gpus=64,
    gpu_memory=80 * GIB,
    tokens=10**12,
    batch_tokens=2**22,
    sequence_tokens=4096,
)
MID = replace(V01, config=preset("mid"), gpus=8, batch_tokens=2**19, tokens=10**10)
MESH = ParallelLayout(shard=64, expert=16)


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return best_on(V01, MESH)


def test_the_seconds_of_a_step_are_those_of_its_parts(plan: TrainingPlan):
    time = plan.time
    parts = sum(time.forward.values()) + sum(time.backward.values()) + time.again
    waits = sum(time.waiting.values())
    assert time.seconds == pytest.approx(parts + waits + time.optimizer + time.others)
    assert time.tokens == V01.batch_tokens
    assert time.others == pytest.approx(V01.device.others.value * time.seconds)


def test_utilisation_is_what_a_training_run_would_log(plan: TrainingPlan):
    flops = training_flops(V01.config, V01.batch_tokens)
    peak = V01.gpus * V01.device.peak_flops
    assert plan.mfu == pytest.approx(flops / plan.time.seconds / peak)
    assert 0.2 < plan.mfu < V01.device.product_share.value
    assert plan.days == pytest.approx(V01.tokens / V01.batch_tokens * plan.time.seconds / 86400)


def test_memory_is_the_sum_of_its_parts(plan: TrainingPlan):
    parts = [getattr(plan.memory, name) for name in plan.memory.__slots__]
    assert plan.memory.total == sum(parts) <= V01.gpu_memory
    assert min(parts) >= 0
    assert plan.activations.layers == sum(plan.activations.by_part.values())


def test_the_search_finds_nothing_slower_than_a_mesh_that_is_named():
    found = search(MID)
    assert found.rank.mesh.world_size == MID.gpus
    assert found.fits
    for mesh in (
        ParallelLayout(shard=8),
        ParallelLayout(replicate=8),
        ParallelLayout(shard=4, tensor=2, sequence=True),
    ):
        assert found.time.seconds <= best_on(MID, mesh).time.seconds


def test_more_devices_take_fewer_days_and_no_less_work():
    few, many = search(MID), search(replace(MID, gpus=32))
    assert many.days < few.days
    assert many.days * 32 >= few.days * 8


def test_less_memory_is_never_faster():
    roomy = best_on(V01, MESH)
    tight = best_on(replace(V01, gpu_memory=56 * GIB), MESH)
    assert tight.rank.work.recompute
    assert tight.time.seconds >= roomy.time.seconds
    assert tight.memory.total <= 56 * GIB


@pytest.mark.parametrize(
    ("run", "mesh", "said"),
    [
        (V01, ParallelLayout(shard=32), r"has 32 ranks .* --gpus is 64"),
        (V01, ParallelLayout(shard=64, expert=3), r"expert=3 does not divide shard=64 x context=1"),
        (replace(V01, sequence_tokens=4000), MESH, r"not a whole number .*: take 4,192,000"),
        (replace(V01, batch_tokens=4096 * 32), MESH, r"64 readers .* take a batch of 262,144"),
        (replace(V01, tokens=1000), MESH, "expected a batch of at most that"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(run: Run, mesh: ParallelLayout, said: str):
    with pytest.raises(InputError, match=said):
        best_on(run, mesh)


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(CapacityError, match=r"of 80.0 GiB on a rank, .*; --mesh .* would"):
        best_on(V01, ParallelLayout(replicate=64))
    with pytest.raises(CapacityError, match=r"take more devices, more memory or shorter"):
        search(replace(V01, gpus=8))
    with pytest.raises(InputError, match=r"cannot be shared out among 7 devices"):
        search(replace(V01, gpus=7))
