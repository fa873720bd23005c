"""What one step of training needs and changes: a model, its optimizer and its data.

Knows neither folders nor clocks: when to save and to stop is the loop's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jamba_lm.data import PackedBatch
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.kernels import ops
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.routing import Routing
from jamba_lm.training.balance import Selections, count_selections
from jamba_lm.training.checkpointing import Progress, SavedRun
from jamba_lm.training.optimizer import learning_rate_at, whole_norm
from jamba_lm.training.passes import Pass, Passes, Share
from jamba_lm.training.pretraining import fresh_start
from jamba_lm.training.recipe import Recipe, RunRecipe
from jamba_lm.training.run_folder import machine_record
from jamba_lm.training.segments import PassProgress, nobody
from jamba_lm.training.spikes import is_spike, remembered
from jamba_lm.training.task import Start, Stream
from jamba_lm.training.together import ALONE, Together
from jamba_lm.training.trained_model import make_model
from jamba_lm.training.validation import Validation, validate
from jamba_lm.training.watching import (
    Maxima,
    all_largest,
    by_layer,
    largest,
    router_load,
)

logger = logging.getLogger(__name__)

KERNELS = ("causal_conv", "selective_scan", "attention")


def plain_sections(recipe: RunRecipe) -> dict[str, dict[str, Any]]:
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
        num_rows: tokens that were read, in all processes.
        losses: by name, each without its coefficient, means over the step.
        maxima: see `watching.watched`; empty when nobody watched.
        load: see `watching.router_load`; likewise.
    """

    num_rows: int
    losses: dict[str, float]
    maxima: Maxima
    load: dict[str, list[float]]


class Learner:
    """A model, its optimizer and its data: what one step of training needs and changes."""

    def __init__(
        self,
        recipe: RunRecipe,
        backend: str | None,
        cache: Path,
        together: Together = ALONE,
        start: Start | None = None,
        progress: PassProgress = nobody,
    ) -> None:
        """Read the data and make the model that training starts from.

        Args:
            recipe: what to do.
            backend: kernel back-end by name, or None.
            cache: folder to keep tokenized text in.
            together: the processes that share the work.
            start: what to start from; None takes fresh weights, and the text that the recipe names.
            progress: told how far a pass in segments is.

        Raises:
            RecipeError: the tokenizer has more tokens than the model.
            DataError: text is missing or unusable.
        """
        self.recipe = recipe
        self.backend = backend
        self.progress = Progress()
        self._together = together
        if start is None:
            assert isinstance(recipe, Recipe), "only a Recipe says how fresh weights are made"
            start = fresh_start(recipe, cache)
        self._start, self._text = start, start.text
        self._stream = self._open_stream()

        self._model = make_model(recipe, together, start.decoder)
        self.decoder, self.optimizer = self._model.decoder, self._model.optimizer
        self._workers = self._model.workers
        self._passes = Passes(recipe, self._model, together, start.before_pass, backend, progress)

    def _open_stream(self) -> Stream:
        return self._text.open_stream(
            self.progress.position, self._together.reader, self._together.readers
        )

    def record(self) -> dict[str, Any]:
        """Describe what is computed, on what, with which data."""
        return {
            **machine_record(),
            "backends": {op: ops.choose(op, backend=self.backend).__name__ for op in KERNELS},
            "dtype": self.recipe.training.dtype,
            "seed": self.recipe.training.seed,
            "parameters": sum(p.numel() for p in self.decoder.parameters()),
            "processes": self._together.processes.count,
            **(self._start.record or {}),
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
            places=self.optimizer.places(),
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
            tokens_seen=self.progress.tokens_seen + done.num_rows,
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
        work = [self._model.rows_of(packed, self.backend) for packed in batches]
        num_rows, num_targets = self._together.add_up(
            [sum(len(rows.ids_M) for rows in work), sum(rows.num_targets for rows in work)]
        )
        share = Share(
            num_targets,
            num_rows,
            len(batches) * self._together.readers,
            self._selections(batches),
        )
        size = len(self._workers.decoders)
        passes: list[Pass] = []
        done = self.progress.steps_done * self.recipe.training.accumulate
        for first in range(0, len(work), size):
            together = [
                (done + first + worker, worker, rows)
                for worker, rows in enumerate(work[first : first + size])
            ]
            last = first + size >= len(work)
            self._model.announce_pass(last=last)
            passes += self._workers.run(
                lambda decoder, item: self._passes.backward(decoder, item, share, watch=watch),
                together,
            )
            self.optimizer.collect(len(together), last=last)
        losses = self._losses(passes)
        if not watch:
            return Gradients(int(num_rows), losses, {}, {})
        return Gradients(
            int(num_rows),
            losses,
            all_largest(largest([one.maxima for one in passes]), self._together),
            router_load(self.decoder, [one.loads for one in passes], self._together),
        )

    def _losses(self, passes: Sequence[Pass]) -> dict[str, float]:
        """Add up the shares of all passes in all processes."""
        names = list(passes[0].losses)
        # Each pass apart, so that the sum does not depend on who took which.
        found = self._together.collected([one.losses[name] for one in passes for name in names])
        shares = [value for one in found for value in one]
        return {name: math.fsum(shares[number :: len(names)]) for number, name in enumerate(names)}

    def _selections(self, batches: Sequence[PackedBatch]) -> Selections | None:
        """Count how often experts are taken in the whole step, when that is to be balanced."""
        alone = len(batches) == self._together.readers == 1
        if self.recipe.loss.balance_over == "pass" or alone:
            return None
        size = len(self._workers.decoders)
        routings: list[Sequence[Routing]] = []
        for first in range(0, len(batches), size):
            routings += self._workers.run(self._route, batches[first : first + size])
        if not routings[0]:
            return None
        own = count_selections(routings)
        (rows,) = self._together.add_up([own.num_rows])
        return Selections(self._together.add_up_tensor(own.selections_X), int(rows))

    def _route(self, decoder: Decoder, packed: PackedBatch) -> Sequence[Routing]:
        rows = self._model.rows_of(packed, self.backend)
        with torch.no_grad():
            decoder(rows.ids_M, rows.batch, hidden=True)
        return rows.routing

    # torch keeps whether gradients are wanted for each thread, so this is said where a worker runs.
    @torch.no_grad()
    def _predict(self, decoder: Decoder, packed: PackedBatch) -> tuple[float, int]:
        rows = self._model.rows_of(packed, self.backend)
        hidden = decoder(rows.ids_M, rows.batch, hidden=True)
        sums = self._model.losses(decoder, hidden, rows, 0.0)
        return sums.entropy.item(), rows.num_targets

    def validate(self) -> Validation:
        """Read the held-out documents."""
        found = validate(
            self._text.validation_batches(),
            partial(self._workers.run, self._predict),
            num_bytes=self._text.validation_bytes,
            at_once=len(self._workers.decoders),
            together=self._together,
        )
        self._model.give_up_gathered()
        return found
