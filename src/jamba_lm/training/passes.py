"""One pass forward and back: the losses of a batch, and its part of the step's gradient.

Knows neither optimizers nor what is read: the steps that passes make up are the learner's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_lm.model.decoder import Decoder
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.training.activation_loss import ActivationLoss
from jamba_lm.training.balance import Selections, count_selections, share_of_balance_loss
from jamba_lm.training.recipe import RunRecipe
from jamba_lm.training.recompute import recompute_layers
from jamba_lm.training.segments import PassProgress, SegmentedPass, nobody
from jamba_lm.training.together import Together
from jamba_lm.training.trained_model import Rows, TrainedModel
from jamba_lm.training.watching import Maxima, loads, watched


@dataclass(frozen=True, slots=True)
class Share:
    """What a pass must know of the step that it is a part of.

    Attributes:
        num_targets: rows of the step that predict something, in all processes.
        num_rows: all rows of it.
        num_passes: of the step, in all processes.
        selections: how often experts are taken in the whole step, when that is to be balanced.
    """

    num_targets: float
    num_rows: float
    num_passes: float
    selections: Selections | None


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass found: its shares of the losses, and what was watched."""

    losses: dict[str, float]
    maxima: Maxima
    loads: list[Tensor]


class Passes:
    """Passes through a model and its copies, as a recipe says."""

    def __init__(
        self,
        recipe: RunRecipe,
        model: TrainedModel,
        together: Together,
        before_pass: Callable[[Decoder, int], None] | None,
        backend: str | None,
        progress: PassProgress = nobody,
    ) -> None:
        """Make the model's copies ready.

        Args:
            recipe: which losses there are, and how passes are computed.
            model: whose decoders are used.
            together: the processes that share the work.
            before_pass: see `task.Start`.
            backend: kernel back-end by name, or None.
            progress: told how far a pass in segments is; of several at one time, the first.
        """
        self._progress = progress
        self._recipe = recipe
        self._model = model
        self._together = together
        self._before_pass = before_pass
        self._backend = backend
        self._activation: list[ActivationLoss] = []
        for decoder in model.workers.decoders:
            if recipe.loss.activation_coef:
                self._activation.append(ActivationLoss(decoder, recipe.loss.activation_coef))
            if recipe.training.recompute_layers:
                recompute_layers(decoder)

    def backward(
        self, decoder: Decoder, item: tuple[int, int, Rows], share: Share, *, watch: bool
    ) -> Pass:
        """Leave a batch's gradient in `decoder`; return its shares of the losses."""
        number, worker, rows = item
        if self._before_pass is not None:
            self._before_pass(decoder, number)
        if self._recipe.training.segment_tokens:
            progress = self._progress if worker == 0 else nobody
            return self._backward_in_segments(decoder, rows, share, watch, progress)
        recipe, maxima = self._recipe, Maxima()
        activation = self._activation[worker] if self._activation else None
        rows_share = len(rows.ids_M) / share.num_rows
        if activation is not None:
            activation.begin(rows_share)
        with ExitStack() as stack:
            if watch:
                maxima = stack.enter_context(watched(decoder))
            hidden = decoder(rows.ids_M, rows.batch, hidden=True)
        sums = self._model.losses(decoder, hidden, rows, recipe.loss.z_coef)
        total = sums.total / share.num_targets
        losses = {"loss": sums.entropy.item() / share.num_targets, "balance_loss": 0.0}
        taken = loads(rows.routing) if watch else []
        if rows.routing:
            balance = self._balance(rows.routing, share)
            total = total + decoder.config.aux_loss_coef * balance
            losses["balance_loss"] = balance.item()
        if recipe.loss.z_coef:
            losses["z_loss"] = sums.squares.item() / share.num_targets
        if activation is not None:
            losses["activation_loss"] = activation.mean_square() * rows_share
        total.backward()
        return Pass(losses, maxima, taken)

    def _balance(self, routing: Sequence[Routing], share: Share) -> Tensor:
        """Return what one pass, or this process' rows of it, adds to the balance loss."""
        if share.selections is not None:
            return share_of_balance_loss(routing, share.selections)
        if self._together.layout.context == 1:
            return balance_loss(routing) / share.num_passes
        own = count_selections([routing])
        *counts, rows = self._together.add_up_of_pass(
            [*own.selections_X.tolist(), float(own.num_rows)]
        )
        selections_X = torch.tensor(counts, device=own.selections_X.device)
        return share_of_balance_loss(routing, Selections(selections_X, int(rows))) / (
            share.num_passes
        )

    def _backward_in_segments(
        self, decoder: Decoder, rows: Rows, share: Share, watch: bool, progress: PassProgress
    ) -> Pass:
        """Do the same a segment of rows at a time."""
        recipe, maxima = self._recipe, Maxima()
        segments = SegmentedPass(
            decoder,
            recipe.training.segment_tokens,
            truncated=recipe.training.across_segments == "truncated",
            backend=self._backend,
            progress=progress,
        )
        with ExitStack() as stack:
            if watch:
                maxima = stack.enter_context(watched(decoder))
            found = segments.backward(
                rows.ids_M,
                rows.targets_M,
                rows.batch.lengths,
                entropy_coef=1 / share.num_targets,
                z_coef=recipe.loss.z_coef,
                balance_coef=decoder.config.aux_loss_coef / share.num_passes,
            )
        losses = {
            "loss": found.entropy / share.num_targets,
            "balance_loss": found.balance / share.num_passes,
        }
        if recipe.loss.z_coef:
            losses["z_loss"] = found.squares / share.num_targets
        return Pass(losses, maxima, found.routing if watch else [])
