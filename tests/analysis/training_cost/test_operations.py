"""Arithmetic is counted as torch counts it, and does not depend on how a mesh cuts it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from jamba_lm.analysis.training_cost.mesh import describe
from jamba_lm.analysis.training_cost.operations import (
    SCAN_AGAIN,
    SCAN_BACKWARD,
    SCAN_FORWARD,
    Flops,
    Operation,
    flops_of,
    pass_operations,
)
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.step import flops_per_token
from jamba_lm.config import JambaConfig
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.loss import summed_cross_entropy
from jamba_lm.training.output import output_weight
from jamba_lm.training.utilization import product_weights
from tests.config_strategies import configs

SMALL = JambaConfig(
    vocab_size=128,
    d_model=32,
    d_ff=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    dt_rank=5,
    attention_period=4,
    attention_offset=2,
)
TOKENS = 40


def counted(config: JambaConfig, *, backward: bool) -> int:
    """Return the operations that torch counts in the products of a pass."""
    with torch.device("meta"):
        decoder = Decoder(config)
    initialize(decoder, 0)
    ids_M = torch.arange(TOKENS) % config.vocab_size
    mode = FlopCounterMode(display=False)
    with mode:
        hidden_MD = decoder(ids_M, Batch.of([TOKENS], backend="reference"), hidden=True)
        loss = summed_cross_entropy(hidden_MD, output_weight(decoder), ids_M)
        if backward:
            loss.backward()
    return sum(
        count
        for operation, count in mode.get_flop_counts()["Global"].items()
        if "bmm" not in str(operation) and "attention" not in str(operation)
    )


def products(config: JambaConfig, mesh: ParallelLayout | None = None, width: int = 4) -> Flops:
    work = Pass(sequences=1, tokens=TOKENS, width=width)
    found = Flops(0, 0, 0)
    for one in pass_operations(Rank(config, mesh or ParallelLayout(), work)):
        if one.kind in ("product", "loss"):
            found += flops_of(one)
    return found


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL.replace(num_experts=1, tie_embeddings=True),
        SMALL.replace(attention_period=1, attention_offset=0),
    ],
)
def test_products_are_those_that_torch_counts(config: JambaConfig):
    ours = products(config)
    head = 2 * TOKENS * config.d_model * config.vocab_size
    # Our loss makes its gradients with its logits: all three products are forward.
    assert counted(config, backward=False) == ours.forward + 2 * head
    assert counted(config, backward=True) == ours.needed


@settings(deadline=None)
@given(configs())
def test_a_token_meets_the_weights_that_a_training_run_logs(config: JambaConfig):
    work = Pass(sequences=1, tokens=8, width=4)
    found = flops_per_token(Rank(config, ParallelLayout(), work))
    no_weights = ("attention", "scan", "convolution")
    needed = sum(flops.needed for part, flops in found.items() if part not in no_weights)
    # An expert gets a whole number of rows.
    experts = found.get("experts", Flops(0, 0, 0)).needed
    exact = 6 * product_weights(config)
    rounding = 6 * 3 * config.d_model * config.d_ff * config.num_experts * config.num_layers / 16
    assert abs(needed - exact) <= (rounding if experts else 0)


@pytest.mark.parametrize(
    "mesh",
    [
        ParallelLayout(tensor=2),
        ParallelLayout(context=4),
        ParallelLayout(shard=4, expert=4),
        ParallelLayout(tensor=2, shard=4, expert=4, sequence=True),
    ],
    ids=describe,
)
def test_the_ranks_of_a_mesh_share_out_the_products_of_the_whole(mesh: ParallelLayout):
    """Every rank of tensor decides for all rows, so the router is counted apart."""

    def without_router(config: JambaConfig, mesh: ParallelLayout) -> float:
        rank = Rank(config, mesh, Pass(sequences=1, tokens=TOKENS, width=4))
        found = [one for one in pass_operations(rank) if one.kind in ("product", "loss")]
        return sum(flops_of(one).forward for one in found if one.part != "router")

    sequences = mesh.num_readers
    assert mesh.world_size * without_router(SMALL, mesh) == sequences * without_router(
        SMALL, ParallelLayout()
    )


def test_attention_is_counted_by_the_pairs_it_looks_at():
    whole = flops_of(Operation("attention", "attention", (64, 0, 4, 2, 8)))
    halves = flops_of(Operation("attention", "attention", (32, 0, 4, 2, 8))) + flops_of(
        Operation("attention", "attention", (32, 32, 4, 2, 8))
    )
    assert whole == halves
    assert whole.forward == 4 * (64 * 65 / 2) * 4 * 8


def test_the_scan_is_counted_by_its_state_updates():
    one = flops_of(Operation("scan", "scan", (10, 6, 4), 3))
    updates = 3 * 10 * 6 * 4
    assert one == Flops(SCAN_FORWARD * updates, SCAN_BACKWARD * updates, SCAN_AGAIN * updates)


@settings(deadline=None)
@given(configs(), st.integers(1, 4), st.integers(1, 30))
def test_more_tokens_are_more_work(config: JambaConfig, sequences: int, tokens: int):
    def needed(sequences: int, tokens: int) -> float:
        work = Pass(sequences=sequences, tokens=tokens, width=4)
        operations = pass_operations(Rank(config, ParallelLayout(), work))
        return sum(flops_of(one).needed for one in operations)

    assert 0 < needed(sequences, tokens) < needed(sequences, tokens + 8)
    assert needed(sequences, tokens) < needed(sequences + 8, tokens)
