"""The model that a run trains: in one process whole, in several spread over them.

Knows a recipe's model, optimizer and layout, and neither data nor losses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from jamba_lm.checkpoint.huggingface import DTYPES
from jamba_lm.data import IGNORED, PackedBatch
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.routing import Routing, RoutingLog
from jamba_lm.training.loss import SummedLosses
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.output import losses_of
from jamba_lm.training.recipe import RunRecipe
from jamba_lm.training.together import Together
from jamba_lm.training.workers import Workers

if TYPE_CHECKING:
    from jamba_lm.training.sharded_optimizer import ShardedAdamW
    from jamba_lm.training.sharding import ShardedDecoder


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a batch that one process works on: all of them, unless others share them.

    Attributes:
        ids_M: token ids.
        targets_M: what each row is to predict.
        batch: which of them belong together.
        routing: filled by the forward pass, when the model has experts.
    """

    ids_M: Tensor
    targets_M: Tensor
    batch: Batch
    routing: Sequence[Routing]

    @property
    def num_targets(self) -> int:
        """Rows that predict something."""
        return int((self.targets_M != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A decoder with its first weights, and what moves them.

    Attributes:
        decoder: computes in the recipe's type.
        optimizer: keeps the float32 weights.
        workers: the decoder and its copies that work at the same time.
        device: of the decoder.
        sharded: how the decoder is spread over processes; None in one process.
    """

    decoder: Decoder
    optimizer: MasterAdamW | ShardedAdamW
    workers: Workers
    device: torch.device
    sharded: ShardedDecoder | None = None

    def rows_of(self, packed: PackedBatch, backend: str | None) -> Rows:
        """Return this process' rows of a batch, on its device.

        Raises:
            DataError: the batch has fewer rows than processes that share it.
        """
        parallel = None if self.sharded is None else self.sharded.parallel
        ids_M, targets_M = packed.ids_M, packed.targets_M
        if parallel is None:
            # No list: FSDP looks for tensors in lists that a layer is given, and hands on copies.
            routing: Sequence[Routing] = deque[Routing]()
            batch = Batch.of(packed.lengths, backend=backend, routing=cast(RoutingLog, routing))
        else:
            share = parallel.share_of(packed, backend=backend)
            ids_M, targets_M = share.ids_M, share.targets_M
            batch, routing = share.batch, share.routing
        return Rows(ids_M.to(self.device), targets_M.to(self.device), batch, routing)

    def losses(self, decoder: Decoder, hidden: Tensor, rows: Rows, z_coef: float) -> SummedLosses:
        """Return the losses of rows from what `decoder`, one of the workers', made of them."""
        if self.sharded is not None and self.sharded.parallel is not None:
            return self.sharded.parallel.losses(hidden, rows.targets_M, z_coef)
        return losses_of(decoder, hidden, rows.targets_M, z_coef)

    def announce_pass(self, *, last: bool) -> None:
        """Say whether the next pass is the last one of its step."""
        if self.sharded is not None:
            self.sharded.reduce_after_pass(last)

    def give_up_gathered(self) -> None:
        """Free what passes without a backward pass have gathered from other processes."""
        if self.sharded is not None:
            self.sharded.give_up_gathered()


def make_model(recipe: RunRecipe, together: Together, decoder: Decoder) -> TrainedModel:
    """Make the model that training starts from.

    Args:
        recipe: how it is trained.
        together: the processes that share the work; several take a decoder without values only.
        decoder: what is trained; on the meta device it is given fresh values.

    Raises:
        ProcessError: torch is too old for several processes.
    """
    fresh = all(parameter.is_meta for parameter in decoder.parameters())
    if together.processes.spread:
        assert fresh, "values are drawn where they are needed"
        return _sharded_model(recipe, together, decoder)
    if fresh:
        initialize(decoder, recipe.training.seed)
    optimizer = MasterAdamW(decoder, recipe.optimizer)
    decoder.to(DTYPES[recipe.training.dtype])
    workers = Workers(decoder, recipe.training.workers)
    optimizer.share_out(workers.decoders[1:], workers.spread)
    return TrainedModel(decoder, optimizer, workers, together.device)


def _sharded_model(recipe: RunRecipe, together: Together, decoder: Decoder) -> TrainedModel:
    # Here and not above: torch.distributed's tensors take a second to import.
    from jamba_lm.training.sharded_optimizer import ShardedAdamW
    from jamba_lm.training.sharding import ShardedDecoder

    sharded = ShardedDecoder(
        decoder, together.layout, together.device, DTYPES[recipe.training.dtype]
    )
    sharded.initialize(recipe.training.seed)
    optimizer = ShardedAdamW(sharded, recipe.optimizer, together.processes)
    return TrainedModel(decoder, optimizer, Workers(decoder, 1), together.device, sharded)
