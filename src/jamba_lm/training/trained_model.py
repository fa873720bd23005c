"""The model that a run trains: in one process whole, in several spread over them.

Knows a recipe's model, optimizer and layout, and neither data nor losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.together import Together
from jamba_lm.training.workers import Workers

if TYPE_CHECKING:
    from jamba_lm.training.sharded_optimizer import ShardedAdamW
    from jamba_lm.training.sharding import ShardedDecoder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A decoder with its first weights, and what moves them.

    Attributes:
        decoder: computes in the recipe's type.
        optimizer: keeps the float32 weights.
        workers: the decoder and its copies that work at the same time.
        sharded: how the decoder is spread over processes; None in one process.
    """

    decoder: Decoder
    optimizer: MasterAdamW | ShardedAdamW
    workers: Workers
    sharded: ShardedDecoder | None = None

    def announce_pass(self, *, last: bool) -> None:
        """Say whether the next pass is the last one of its step."""
        if self.sharded is not None:
            self.sharded.reduce_after_pass(last)

    def give_up_gathered(self) -> None:
        """Free what passes without a backward pass have gathered from other processes."""
        if self.sharded is not None:
            self.sharded.give_up_gathered()


def make_model(recipe: Recipe, together: Together) -> TrainedModel:
    """Make the model that training starts from.

    Raises:
        ProcessError: torch is too old for several processes.
    """
    with torch.device("meta"):
        decoder = Decoder(recipe.model)
    dtype, seed = DTYPES[recipe.training.dtype], recipe.training.seed
    if together.processes.count > 1:
        return _sharded_model(recipe, together, decoder)
    initialize(decoder, seed)
    optimizer = MasterAdamW(decoder, recipe.optimizer)
    decoder.to(dtype)
    workers = Workers(decoder, recipe.training.workers)
    optimizer.share_out(workers.decoders[1:], workers.spread)
    return TrainedModel(decoder, optimizer, workers)


def _sharded_model(recipe: Recipe, together: Together, decoder: Decoder) -> TrainedModel:
    # Here and not above: torch.distributed's tensors take a second to import.
    from jamba_lm.training.sharded_optimizer import ShardedAdamW
    from jamba_lm.training.sharding import ShardedDecoder

    sharded = ShardedDecoder(
        decoder, together.layout, together.device, DTYPES[recipe.training.dtype]
    )
    sharded.initialize(recipe.training.seed)
    optimizer = ShardedAdamW(sharded, recipe.optimizer, together.processes)
    return TrainedModel(decoder, optimizer, Workers(decoder, 1), sharded)
