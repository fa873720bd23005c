"""Operations are timed as a pass has them, and a prediction is made of them alone."""

from __future__ import annotations

from typing import get_args

import pytest

from jamba_lm.analysis.training_cost.exchanges import Exchange
from jamba_lm.analysis.training_cost.mesh import Group
from jamba_lm.analysis.training_cost.operations import Kind, Operation, pass_operations
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.step import step_time
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training import operation_speed
from jamba_lm.training.operation_speed import MeasuredMachine

SMALL = JambaConfig(
    vocab_size=64,
    d_model=16,
    d_ff=24,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    dt_rank=2,
    attention_period=4,
    attention_offset=2,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_speed, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(operation_speed, "OPTIMIZER_SAMPLE", SMALL)


def test_every_kind_of_operation_can_be_timed():
    assert set(operation_speed._PROBES) == set(get_args(Kind))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_is_predicted_from_its_operations(quick: None, workers: int):
    rank = Rank(SMALL, ParallelLayout(), Pass(sequences=2, tokens=24))
    machine = MeasuredMachine(workers)
    time = step_time(rank, machine, passes=3)
    # Each worker makes three passes of its own.
    assert time.tokens == workers * 3 * 48
    assert time.others == 0.0
    for part in {one.part for one in pass_operations(rank)}:
        assert time.forward[part] > 0, part
        assert time.backward[part] > 0, part
    assert time.seconds == pytest.approx(time.computing + time.optimizer)
    # What was measured once is not measured again, and so has the same bits.
    assert step_time(rank, machine, passes=3) == time


def test_larger_operations_take_longer(quick: None):
    # Thousands of times the work, so that no other load of the machine can turn it around.
    machine = MeasuredMachine()
    sizes: dict[Kind, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "product": ((8, 32, 32), (2048, 512, 512)),
        "scan": ((16, 16, 16), (2048, 256, 16)),
        "gate": ((16, 64), (8192, 1024)),
    }
    for kind, (small, large) in sizes.items():
        seconds = [sum(machine.seconds(Operation("MLP", kind, one), 4)) for one in (small, large)]
        assert seconds[0] < seconds[1], kind


def test_one_machine_has_nobody_to_send_to():
    with pytest.raises(InputError, match="plan without --this-machine"):
        MeasuredMachine().exchange_seconds(
            Exchange("tensor", "rows", "all-reduce", Group(8, 1), 100, 1)
        )
