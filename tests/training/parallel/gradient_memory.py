"""How many values of gradients a process holds between the passes of a step; see test_gradients."""

from __future__ import annotations

import torch

from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.output import output_weight
from jamba_lm.training.sharding import ShardedDecoder
from tests.arms import SMALL


def on_process(rank: int, world_size: int) -> dict[str, int]:
    """Take a pass that is not the last of its step."""
    with torch.device("meta"):
        decoder = Decoder(SMALL)
    layout = ParallelLayout(shard=world_size)
    sharded = ShardedDecoder(decoder, layout, torch.device("cpu"), torch.float32)
    sharded.initialize(0)
    sharded.reduce_after_pass(False)
    ids_M = torch.arange(12) % SMALL.vocab_size
    hidden = decoder(ids_M, Batch.of([12]), hidden=True)
    (hidden @ output_weight(decoder).T).square().sum().backward()
    found = [one for one in sharded.parameters if one.summed]
    gradients = [one.gradient() for one in found]
    assert all(one is not None for one in gradients), "a pass leaves its sums behind"
    return {
        "weights": sum(one.local().numel() for one in found),
        "gradients": sum(one.numel() for one in gradients if one is not None),
    }
