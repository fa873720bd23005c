"""A mesh is read strictly, and refused where it cannot divide what it splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.training_cost.mesh import Group, Mesh, check_mesh, group_of, parse_mesh
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError

axes = st.integers(1, 64)
meshes = st.builds(
    Mesh,
    replicate=axes,
    shard=axes,
    context=axes,
    tensor=axes,
    expert=axes,
    sequence=st.booleans(),
)


@given(meshes)
def test_a_mesh_is_read_as_it_is_written(mesh: Mesh):
    assert parse_mesh(mesh.describe()) == mesh


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
        (Mesh(tensor=3), r"num_heads=32: 2 would"),
        (Mesh(tensor=16), r"num_kv_heads=8: 8 would"),
        (Mesh(shard=32, expert=32), r"num_experts=16: 16 would"),
        (Mesh(shard=12, expert=8), r"= 12, whose ranks .*: 6 would"),
        (Mesh(context=3), r"take a sequence of 4,098"),
        (Mesh(shard=2, sequence=True), r"give tensor=2 or more"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(mesh: Mesh, said: str):
    with pytest.raises(InputError, match=said):
        check_mesh(mesh, JambaConfig(), 4096)


@given(meshes)
def test_the_axes_of_a_mesh_make_up_its_ranks(mesh: Mesh):
    """Walking along every axis from rank 0, by its stride, meets each rank exactly once."""
    small = Mesh(
        replicate=mesh.replicate % 3 + 1,
        shard=mesh.shard % 3 + 1,
        context=mesh.context % 3 + 1,
        tensor=mesh.tensor % 3 + 1,
    )
    ranks = [0]
    shard = Group(small.shard, small.tensor * small.context)
    for group in (*(group_of(small, one) for one in ("tensor", "context", "replicate")), shard):
        ranks = [rank + step * group.stride for rank in ranks for step in range(group.size)]
    assert sorted(ranks) == list(range(small.gpus))


def test_members_of_a_group_share_a_node_as_far_as_they_are_near():
    assert Group(8, 1).in_a_node(8) == 8
    assert Group(16, 1).in_a_node(8) == 8
    assert Group(8, 4).in_a_node(8) == 2
    assert Group(8, 8).in_a_node(8) == 1
    assert Group(8, 64).in_a_node(8) == 1
