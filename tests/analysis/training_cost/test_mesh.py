"""A mesh is read strictly, and refused where it cannot divide what it splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.training_cost.mesh import Group, check_mesh, describe, group_of, parse_mesh
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.parallel_layout import ParallelLayout

axes = st.integers(1, 64)
meshes = st.builds(
    ParallelLayout,
    replicate=axes,
    shard=axes,
    context=axes,
    tensor=axes,
    expert=axes,
    sequence=st.booleans(),
)


@given(meshes)
def test_a_mesh_is_read_as_it_is_written(mesh: ParallelLayout):
    assert parse_mesh(describe(mesh)) == mesh


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shard", "expected AXIS=NUMBER"),
        ("shards=8", "did you mean 'shard'"),
        ("shard=0", "from 1 to"),
        ("shard=-2", "from 1 to"),
        ("shard=1.5", "from 1 to"),
        ("shard=9999999", "from 1 to"),
        ("shard=2,shard=4", "twice"),
        ("sequence=maybe", "true or false"),
        ("", "expected AXIS=NUMBER"),
    ],
)
def test_a_mesh_that_is_none_is_refused(text: str, said: str):
    with pytest.raises(InputError, match=said):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (ParallelLayout(tensor=3), r"tensor=3 does not divide vocab_size=65536"),
        (ParallelLayout(shard=32, expert=32), r"expert=32 does not divide num_experts=16"),
        (ParallelLayout(shard=12, expert=8), r"expert=8 does not divide shard=12 x context=1"),
        (ParallelLayout(context=3), r"take a sequence of 4,098"),
        (ParallelLayout(shard=2, sequence=True), r"set parallel.tensor to 2 or more"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(mesh: ParallelLayout, said: str):
    with pytest.raises(InputError, match=said):
        check_mesh(mesh, JambaConfig(), 4096)


@given(meshes)
def test_the_axes_of_a_mesh_make_up_its_ranks(mesh: ParallelLayout):
    """Walking along every axis from rank 0, by its stride, meets each rank exactly once."""
    small = ParallelLayout(
        replicate=mesh.replicate % 3 + 1,
        shard=mesh.shard % 3 + 1,
        context=mesh.context % 3 + 1,
        tensor=mesh.tensor % 3 + 1,
    )
    ranks = [0]
    for group in (group_of(small, one) for one in ("tensor", "weights", "replicate")):
        ranks = [rank + step * group.stride for rank in ranks for step in range(group.size)]
    assert sorted(ranks) == list(range(small.world_size))


@given(meshes, st.integers(0, 2**20))
def test_groups_are_those_of_the_layouts_own_coordinates(mesh: ParallelLayout, number: int):
    rank = number % mesh.world_size
    places = mesh.coordinates(rank)
    for axis in ("tensor", "context", "replicate"):
        group = group_of(mesh, axis)
        assert group.size == getattr(mesh, axis)
        if places[axis] + 1 < group.size:
            places_of_next = mesh.coordinates(rank + group.stride)
            assert places_of_next == {**places, axis: places[axis] + 1}


def test_members_of_a_group_share_a_node_as_far_as_they_are_near():
    assert Group(8, 1).in_a_node(8) == 8
    assert Group(16, 1).in_a_node(8) == 8
    assert Group(8, 4).in_a_node(8) == 2
    assert Group(8, 8).in_a_node(8) == 1
    assert Group(8, 64).in_a_node(8) == 1
