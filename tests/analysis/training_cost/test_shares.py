"""The shares of all ranks are the whole model, and on one rank they are our own model's bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.analysis.memory import parameter_counts
from jamba_lm.analysis.training_cost.mesh import describe, weight_shards
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.rank_memory import rank_memory
from jamba_lm.analysis.training_cost.shares import chunks, rank_shares
from jamba_lm.analysis.training_cost.step import held_values
from jamba_lm.config import JambaConfig
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.recipe import OptimizerSection
from tests.config_strategies import configs

SMALL = JambaConfig(
    vocab_size=256,
    d_model=64,
    d_ff=96,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    dt_rank=5,
)


@given(st.integers(1, 100), st.integers(1, 40))
def test_chunks_are_those_of_torch(length: int, parts: int):
    ours = [size for size in chunks(length, parts) if size]
    assert ours == [len(one) for one in torch.zeros(length).chunk(parts)]
    assert len(chunks(length, parts)) == parts


@settings(deadline=None)
@given(configs())
def test_one_rank_holds_the_whole_model(config: JambaConfig):
    rank = Rank(config, ParallelLayout(), Pass(sequences=1, tokens=8))
    assert held_values(rank) == parameter_counts(config).total


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [SMALL, SMALL.replace(tie_embeddings=True, num_experts=1)])
def test_weights_gradients_and_moments_are_those_of_a_real_model_to_the_byte(
    config: JambaConfig, dtype: str, passes: int, workers: int
):
    with torch.device("meta"):
        decoder = Decoder(config)
    initialize(decoder, 0)
    optimizer = MasterAdamW(decoder, OptimizerSection())
    decoder.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    decoders = [decoder, *(copy.deepcopy(decoder) for _ in range(workers - 1))]
    optimizer.share_out(decoders[1:], lambda work, items: [work(item) for item in items])
    width = {"fp32": 4, "bf16": 2}[dtype]
    rank = Rank(config, ParallelLayout(), Pass(sequences=1, tokens=8, width=width))
    memory, kept = rank_memory(rank, passes, workers=workers)
    parameters = [one for decoder in decoders for one in decoder.parameters()]
    for number in range(passes):
        for one in parameters:
            one.grad = torch.zeros_like(one)
        optimizer.collect(workers, last=number == passes - 1)
    weights = sum(one.nbytes for one in parameters)
    assert memory.parameters == weights
    assert memory.optimizer == sum(one.nbytes for one in optimizer.tensors().values())
    # What the last pass left, and the sum of those before it.
    waiting = sum(one.nbytes for pass_ in optimizer._waiting for one in pass_)
    assert memory.gradients == waiting + optimizer._sum.nbytes
    assert memory.gathered == memory.buffers == 0
    assert memory.activations + memory.logits == workers * kept.total


DIVIDING = [
    ParallelLayout(shard=4),
    ParallelLayout(tensor=2),
    ParallelLayout(expert=4, shard=4),
    ParallelLayout(shard=2, tensor=2, expert=2, sequence=True),
    ParallelLayout(replicate=3, context=2, shard=2, expert=2),
]


@pytest.mark.parametrize("mesh", DIVIDING, ids=describe)
def test_the_shares_of_a_group_are_the_whole(mesh: ParallelLayout):
    """Every tensor of these sizes divides, so the largest share times the ranks is the tensor."""
    whole = {one.name: one for one in rank_shares(SMALL, ParallelLayout())}
    for one in rank_shares(SMALL, mesh):
        values = whole[one.name].copies * whole[one.name].gathered
        experts = one.part == "experts"
        apart = mesh.tensor * (mesh.expert if experts else 1)
        gathered = one.copies * one.gathered
        assert gathered * apart in (values, values * apart), one.name
        shards = 1 if one.wide else mesh.expert_shard if experts else weight_shards(mesh)
        assert one.held == chunks(one.held * shards, shards)[0]
        assert one.gathered <= one.held * shards, one.name


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4]))
def test_more_ranks_never_hold_more(tensor: int, shard: int, expert: int):
    def held(mesh: ParallelLayout) -> int:
        return held_values(Rank(SMALL, mesh, Pass(sequences=1, tokens=8)))

    config_tensor = min(tensor, 2)
    if shard % expert:
        expert = 1
    mesh = ParallelLayout(shard=shard, tensor=config_tensor, expert=expert)
    assert held(mesh) <= held(ParallelLayout())
    assert held(ParallelLayout(shard=2 * shard, tensor=config_tensor, expert=expert)) <= held(mesh)
    # No rank can hold less than its even share.
    assert held(mesh) * mesh.world_size >= held(ParallelLayout())
