"""What one step of training needs and changes: a model, its optimizer and its data.

Knows neither folders nor clocks: when to save and to stop is the loop's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jamba_lm.corpus.mixture import MixedStream
from jamba_lm.data import PackedBatch, PackedStream
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.training.activation_loss import ActivationLoss
from jamba_lm.training.balance import Selections, count_selections, share_of_balance_loss
from jamba_lm.training.checkpointing import Progress, SavedRun
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.optimizer import MasterAdamW, learning_rate_at, whole_norm
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.recompute import recompute_layers
from jamba_lm.training.run_folder import machine_record
from jamba_lm.training.run_text import RunText
from jamba_lm.training.segments import SegmentedPass
from jamba_lm.training.spikes import is_spike, remembered
from jamba_lm.training.validation import Validation, output_weight, validate
from jamba_lm.training.watching import (
    Maxima,
    by_layer,
    largest,
    loads,
    router_load,
    watched,
)
from jamba_lm.training.workers import Workers

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("causal_conv", "selective_scan", "attention")


def plain_sections(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the recipe's sections as JSON keeps them."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }
        for section, values in recipe.to_dict().items()
    }


@dataclass(frozen=True, slots=True)
class Gradients:
    """What the passes of a step found, beside the gradient.

    Attributes:
        losses: by name, each without its coefficient, means over the step.
        maxima: see `watching.watched`; empty when nobody watched.
        load: see `watching.router_load`; likewise.
    """

    losses: dict[str, float]
    maxima: Maxima
    load: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class _Share:
    """What a pass must know of the step that it is a part of."""

    num_targets: int
    num_rows: int
    num_passes: int
    selections: Selections | None


@dataclass(frozen=True, slots=True)
class _Pass:
    losses: dict[str, float]
    maxima: Maxima
    loads: list[Tensor]


class Learner:
    """A model, its optimizer and its data: what one step of training needs and changes."""

    def __init__(self, recipe: Recipe, backend: str | None, cache: Path) -> None:
        """Read the data and make the model that training starts from.

        Args:
            recipe: what to do.
            backend: kernel back-end by name, or None.
            cache: folder to keep tokenized text in.

        Raises:
            RecipeError: the tokenizer has more tokens than the model.
            DataError: text is missing or unusable.
        """
        self.recipe = recipe
        self.backend = backend
        self.progress = Progress()
        self._text = RunText(recipe, cache)
        self._stream = self._open_stream()

        with torch.device("meta"):
            self.decoder = Decoder(recipe.model)
        initialize(self.decoder, recipe.training.seed)
        self.optimizer = MasterAdamW(self.decoder, recipe.optimizer)
        self.decoder.to(DTYPES[recipe.training.dtype])
        self._workers = Workers(self.decoder, recipe.training.workers)
        self.optimizer.share_out(self._workers.decoders[1:], self._workers.spread)
        self._activation: list[ActivationLoss] = []
        for decoder in self._workers.decoders:
            if recipe.loss.activation_coef:
                self._activation.append(ActivationLoss(decoder, recipe.loss.activation_coef))
            if recipe.training.recompute_layers:
                recompute_layers(decoder)

    def _open_stream(self) -> PackedStream | MixedStream:
        return self._text.open_stream(self.progress.position)

    def record(self) -> dict[str, Any]:
        """Describe what is computed, on what, with which data."""
        return {
            **machine_record(),
            "backends": {op: ops.choose(op, backend=self.backend).__name__ for op in KERNELS},
            "dtype": self.recipe.training.dtype,
            "seed": self.recipe.training.seed,
            "parameters": sum(p.numel() for p in self.decoder.parameters()),
            **self._text.record(),
        }

    def restore(self, saved: SavedRun) -> None:
        """Go back to where `saved` was written.

        Raises:
            DataError: the training text or its tokenization has changed since.
            CheckpointError: the checkpoint is of another model.
        """
        if saved.data != self._text.fingerprint:
            raise DataError(
                "the training text or the tokenizer is not what this run was reading: bring it "
                "back, or start in another --out folder"
            )
        if saved.threads != torch.get_num_threads():
            logger.warning(
                "the run was computed with %d threads and goes on with %d: sums are taken in "
                "another order, so the last bits will differ from an uninterrupted run",
                saved.threads,
                torch.get_num_threads(),
            )
        self.optimizer.restore(saved.tensors, saved.progress.steps_done)
        self.progress = saved.progress
        self._stream = self._open_stream()

    def roll_back(self, saved: SavedRun) -> None:
        """Go back to the weights of `saved`, and on with the data that was not read yet."""
        position, tokens = self.progress.position, self.progress.tokens_seen
        self.optimizer.restore(saved.tensors, saved.progress.steps_done)
        self.progress = replace(saved.progress, position=position, tokens_seen=tokens)

    def save(self, log_bytes: int) -> SavedRun:
        """Return what a checkpoint holds; the tensors are views, to be written before a step."""
        return SavedRun(
            progress=replace(self.progress, log_bytes=log_bytes),
            recipe=plain_sections(self.recipe),
            data=self._text.fingerprint,
            threads=torch.get_num_threads(),
            tensors=self.optimizer.tensors(),
        )

    def step(self, *, watch: bool = False) -> list[dict[str, Any]]:
        """Take one optimizer step.

        Args:
            watch: look inside the model as well.

        Returns:
            Its record for the log; when the model was watched, a second one.

        Raises:
            RecipeError: the loss or the gradient is not finite, and the recipe does not say to
                go on.
        """
        recipe = self.recipe
        batches = [self._stream.next() for _ in range(recipe.training.accumulate)]
        done = self.gradients(batches, watch=watch)
        norms = self.optimizer.gradient_norms()
        norm = whole_norm(norms)
        rate = learning_rate_at(
            self.progress.steps_done,
            recipe.training.steps,
            recipe.optimizer.learning_rate,
            recipe.schedule,
        )
        loss = done.losses["loss"]
        recent = self.progress.recent_losses
        finite = math.isfinite(loss) and math.isfinite(norm)
        spike = not finite or is_spike(loss, recent, recipe.watch.spike_threshold)
        if not finite and recipe.watch.spike == "noted":
            raise RecipeError(self._diverged(loss, norm))
        if spike and recipe.watch.spike != "noted":
            self.optimizer.forget()
        else:
            self.optimizer.step(rate, norm)
        self.progress = Progress(
            steps_done=self.progress.steps_done + 1,
            tokens_seen=self.progress.tokens_seen + sum(len(one.ids_M) for one in batches),
            position=self._stream.position,
            recent_losses=recent if spike else remembered(loss, recent),
        )
        record = {
            "event": "step",
            "step": self.progress.steps_done,
            "tokens_seen": self.progress.tokens_seen,
            "epoch": self._stream.position.epoch,
            **done.losses,
            "learning_rate": rate,
            "gradient_norm": norm,
        }
        if spike:
            record["spike"] = recipe.watch.spike
        if not watch:
            return [record]
        seen = {"event": "watch", "step": self.progress.steps_done, "maxima": done.maxima}
        return [record, {**seen, "router_load": done.load, "gradient_norms": by_layer(norms)}]

    def _diverged(self, loss: float, norm: float) -> str:
        return (
            f"training diverged at step {self.progress.steps_done + 1}: the loss is {loss} and "
            f"the gradient norm {norm}; lower optimizer.learning_rate (now "
            f"{self.recipe.optimizer.learning_rate:g}) and start again or resume"
        )

    def gradients(self, batches: Sequence[PackedBatch], *, watch: bool = False) -> Gradients:
        """Collect the gradient of the mean loss of all `batches` for the next step.

        The cross entropy is a mean over all tokens of the step, so that batches weigh as much as
        they predict; the activation loss over all rows, and the balance loss over passes or all
        rows, as the recipe says. They are kept apart: peers that add them up before averaging
        scale one by the other's count.
        """
        share = _Share(
            sum(packed.num_targets for packed in batches),
            sum(len(packed.ids_M) for packed in batches),
            len(batches),
            self._selections(batches),
        )
        size = len(self._workers.decoders)
        passes: list[_Pass] = []
        for first in range(0, len(batches), size):
            together = batches[first : first + size]
            work = list(zip(range(size), together, strict=False))
            passes += self._workers.run(
                lambda decoder, item: self._backward(decoder, item, share, watch), work
            )
            self.optimizer.collect(len(together))
        losses = {name: math.fsum(one.losses[name] for one in passes) for name in passes[0].losses}
        if not watch:
            return Gradients(losses, {}, {})
        return Gradients(
            losses,
            largest([one.maxima for one in passes]),
            router_load(self.decoder, [one.loads for one in passes]),
        )

    def _selections(self, batches: Sequence[PackedBatch]) -> Selections | None:
        """Count how often experts are taken in the whole step, when that is to be balanced."""
        if self.recipe.loss.balance_over == "pass" or len(batches) == 1:
            return None
        size = len(self._workers.decoders)
        routings: list[list[Routing]] = []
        for first in range(0, len(batches), size):
            routings += self._workers.run(self._route, batches[first : first + size])
        return count_selections(routings) if routings[0] else None

    def _route(self, decoder: Decoder, packed: PackedBatch) -> list[Routing]:
        routing: list[Routing] = []
        with torch.no_grad():
            batch = Batch.of(packed.lengths, backend=self.backend, routing=routing)
            decoder(packed.ids_M, batch, hidden=True)
        return routing

    def _backward(
        self, decoder: Decoder, item: tuple[int, PackedBatch], share: _Share, watch: bool
    ) -> _Pass:
        """Leave a batch's gradient in `decoder`; return its shares of the losses."""
        number, packed = item
        if self.recipe.training.segment_tokens:
            return self._backward_in_segments(decoder, packed, share, watch)
        recipe, routing, maxima = self.recipe, list[Routing](), Maxima()
        activation = self._activation[number] if self._activation else None
        rows_share = len(packed.ids_M) / share.num_rows
        if activation is not None:
            activation.begin(rows_share)
        batch = Batch.of(packed.lengths, backend=self.backend, routing=routing)
        with ExitStack() as stack:
            if watch:
                maxima = stack.enter_context(watched(decoder))
            hidden_MD = decoder(packed.ids_M, batch, hidden=True)
        sums = summed_losses(
            hidden_MD, output_weight(decoder), packed.targets_M, recipe.loss.z_coef
        )
        total = sums.total / share.num_targets
        losses = {"loss": sums.entropy.item() / share.num_targets}
        taken = loads(routing) if watch else []
        if routing:
            if share.selections is not None:
                balance = share_of_balance_loss(routing, share.selections)
            else:
                balance = balance_loss(routing) / share.num_passes
            total = total + recipe.model.aux_loss_coef * balance
            losses["balance_loss"] = balance.item()
        else:
            losses["balance_loss"] = 0.0
        if recipe.loss.z_coef:
            losses["z_loss"] = sums.squares.item() / share.num_targets
        if activation is not None:
            losses["activation_loss"] = activation.mean_square() * rows_share
        total.backward()
        return _Pass(losses, maxima, taken)

    def _backward_in_segments(
        self, decoder: Decoder, packed: PackedBatch, share: _Share, watch: bool
    ) -> _Pass:
        """Do the same a segment of rows at a time."""
        recipe, maxima = self.recipe, Maxima()
        segments = SegmentedPass(
            decoder,
            recipe.training.segment_tokens,
            truncated=recipe.training.across_segments == "truncated",
            backend=self.backend,
        )
        with ExitStack() as stack:
            if watch:
                maxima = stack.enter_context(watched(decoder))
            found = segments.backward(
                packed.ids_M,
                packed.targets_M,
                packed.lengths,
                weight_VD=output_weight(decoder),
                entropy_coef=1 / share.num_targets,
                z_coef=recipe.loss.z_coef,
                balance_coef=recipe.model.aux_loss_coef / share.num_passes,
            )
        losses = {
            "loss": found.entropy / share.num_targets,
            "balance_loss": found.balance / share.num_passes,
        }
        if recipe.loss.z_coef:
            losses["z_loss"] = found.squares / share.num_targets
        return _Pass(losses, maxima, found.routing if watch else [])

    def validate(self) -> Validation:
        """Read the held-out documents."""
        return validate(
            self.decoder,
            self._text.held_out,
            sequence_tokens=self.recipe.data.sequence_tokens,
            batch_tokens=self.recipe.training.batch_tokens,
            backend=self.backend,
        )
