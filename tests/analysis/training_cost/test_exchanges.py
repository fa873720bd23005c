"""What ranks tell each other: bytes that follow from the shape, and seconds from the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.memory import parameter_counts
from jamba_lm.analysis.training_cost.devices import DEVICES, device_named
from jamba_lm.analysis.training_cost.exchanges import Exchange, pass_exchanges, step_exchanges
from jamba_lm.analysis.training_cost.mesh import Group, describe
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.parallel.traffic import pass_values

V01 = JambaConfig()
H100 = DEVICES["h100"]


def exchanges(
    mesh: ParallelLayout, recompute: bool = False
) -> dict[tuple[str, str, str], Exchange]:
    rank = Rank(V01, mesh, Pass(sequences=1, tokens=4096, recompute=recompute))
    found = [*pass_exchanges(rank), *step_exchanges(rank)]
    return {(one.purpose, one.name, one.pattern): one for one in found}


def test_one_rank_tells_nobody_anything():
    assert not exchanges(ParallelLayout())


def test_fsdp_gathers_every_weight_twice_and_scatters_its_gradient_once():
    found = exchanges(ParallelLayout(shard=64))
    total = parameter_counts(V01).total
    gathered = sum(
        one.num_bytes * one.count for one in found.values() if one.pattern == "all-gather"
    )
    scattered = sum(
        one.num_bytes * one.count for one in found.values() if one.pattern == "reduce-scatter"
    )
    # A_log and D stay where they are; a layer's bytes are rounded down.
    apart = 28 * 8192 * (16 + 1)
    assert gathered == pytest.approx(2 * 2 * (total - apart), rel=1e-6)
    assert scattered == pytest.approx(4 * (total - apart), rel=1e-6)
    assert found["gradients", "of A_log and D", "all-reduce"].num_bytes == 4 * apart


def test_rows_go_to_their_experts_and_back_and_so_do_their_gradients():
    (experts,) = [
        one
        for one in exchanges(ParallelLayout(shard=16, expert=16)).values()
        if one.purpose == "experts"
    ]
    assert experts.num_bytes == 4096 * 2 * 4096 * 2
    assert experts.count == 4 * 16
    again = exchanges(ParallelLayout(shard=16, expert=16), recompute=True)
    assert again[experts.purpose, experts.name, experts.pattern].count == 6 * 16


def test_sequence_parallelism_moves_what_tensor_parallelism_sums():
    plain = exchanges(ParallelLayout(tensor=8))["tensor", "rows", "all-reduce"]
    cut = exchanges(ParallelLayout(tensor=8, sequence=True))
    halves = [cut["tensor", "rows", one] for one in ("all-gather", "reduce-scatter")]
    assert plain.wire_bytes == sum(one.wire_bytes for one in halves)
    # Two sums a layer forward and two backward; the embedding's, and the head's gradient.
    assert plain.count == 4 * 32 + 2


def test_every_rank_of_a_context_sees_the_ends_of_the_others():
    found = exchanges(ParallelLayout(context=4))
    states = found["context", "states", "all-gather"]
    assert states.num_bytes == 4 * 8192 * 17 * 4
    assert states.count == found["context", "states", "reduce-scatter"].count == 28
    window = found["context", "last inputs", "all-gather"]
    assert window.num_bytes == 4 * 3 * 8192 * 2
    keys = found["context", "keys and values", "all-gather"]
    assert keys.num_bytes == 2 * 4096 * 8 * 128 * 2
    assert keys.count == 4


@pytest.mark.parametrize(
    "mesh",
    [
        ParallelLayout(tensor=4),
        ParallelLayout(tensor=4, sequence=True),
        ParallelLayout(tensor=16),
        ParallelLayout(context=4),
        ParallelLayout(shard=8, expert=8),
        ParallelLayout(shard=2, context=2, tensor=8, expert=4, sequence=True),
    ],
    ids=describe,
)
def test_a_pass_says_as_much_as_training_does(mesh: ParallelLayout):
    work = Pass(sequences=1, tokens=4096, width=4)
    rank = Rank(V01, mesh, work)
    said = dict.fromkeys(("tensor", "context", "experts"), 0.0)
    for one in pass_exchanges(rank):
        if one.purpose in said:
            said[one.purpose] += one.count * one.num_bytes / 4
    expected = pass_values(V01, mesh, rows=rank.rows)
    assert said["context"] == expected["context"]
    assert said["experts"] == expected["expert"]
    # Not counted here: what the loss says of a row, and gradients of gains.
    assert said["tensor"] == pytest.approx(expected["tensor"], rel=1e-3)


def test_replicas_sum_their_gradients_once_a_step():
    found = exchanges(ParallelLayout(replicate=2, shard=64))["replicas", "gradients", "all-reduce"]
    assert found.count == 1
    assert found.num_bytes == pytest.approx(4 * parameter_counts(V01).total / 64, rel=1e-2)


patterns = st.sampled_from(["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"])


@given(patterns, st.integers(1, 8), st.integers(0, 6), st.integers(1, 10**9))
def test_nothing_is_faster_than_its_wire(pattern: str, size: int, stride: int, count: int):
    one = Exchange("tensor", "rows", pattern, Group(2**size, 2**stride), count, 3)  # type: ignore[arg-type]
    seconds = H100.exchange_seconds(one)
    assert seconds >= one.wire_bytes / (H100.link_bytes.value + 8 * H100.network_bytes.value)
    assert H100.exchange_seconds(replace(one, num_bytes=2 * count)) >= seconds
    assert H100.exchange_seconds(replace(one, count=6)) == pytest.approx(2 * seconds)


@given(patterns, st.integers(10**6, 10**9))
def test_a_group_within_a_node_is_not_slower_than_one_across(pattern: str, count: int):
    near = Exchange("tensor", "rows", pattern, Group(8, 1), count, 1)  # type: ignore[arg-type]
    far = replace(near, group=Group(8, 8))
    assert H100.exchange_seconds(near) < H100.exchange_seconds(far)


def test_every_assumption_says_where_it_is_from():
    for name, one in H100.assumptions():
        assert one.source, name
        assert one.origin in ("data sheet", "measured", "chosen")
        assert one.value > 0


def test_a_device_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="no device 'h10' among h100"):
        device_named("h10")
