"""What one step of training needs and changes: a model, its optimizer and its data.

Knows neither folders nor clocks: when to save and to stop is the loop's business.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from jamba_lm.data import PackedBatch, PackedStream
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.training.checkpointing import Progress, SavedRun
from jamba_lm.training.loss import summed_cross_entropy
from jamba_lm.training.optimizer import MasterAdamW, learning_rate_at
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.run_folder import machine_record
from jamba_lm.training.token_cache import tokenized
from jamba_lm.training.validation import Validation, output_weight, validate
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
        tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
        if tokenizer.vocab_size > recipe.model.vocab_size:
            raise RecipeError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model a vocab_size of "
                f"{recipe.model.vocab_size:,}: raise it, or train a smaller tokenizer"
            )
        file = Path(recipe.data.tokenizer)
        file = file / "tokenizer.json" if file.is_dir() else file
        self._documents, self._held_out = (
            tokenized(
                [Path(path) for path in paths],
                tokenizer,
                file,
                cache=cache / f"{what}.tokens.safetensors",
                what=what,
            )
            for what, paths in (
                ("training", recipe.data.train),
                ("validation", recipe.data.validation),
            )
        )
        self._data = self._documents.fingerprint()
        self._stream = self._open_stream()

        with torch.device("meta"):
            self.decoder = Decoder(recipe.model)
        initialize(self.decoder, recipe.training.seed)
        self.optimizer = MasterAdamW(self.decoder, recipe.optimizer)
        self.decoder.to(DTYPES[recipe.training.dtype])
        self._workers = Workers(self.decoder, recipe.training.workers)
        for decoder in self._workers.decoders[1:]:
            self.optimizer.add_copy(decoder)

    def _open_stream(self) -> PackedStream:
        return PackedStream(
            self._documents,
            sequence_tokens=self.recipe.data.sequence_tokens,
            batch_tokens=self.recipe.training.batch_tokens,
            seed=self.recipe.training.seed,
            position=self.progress.position,
        )

    def record(self) -> dict[str, Any]:
        """Describe what is computed, on what, with which data."""
        return {
            **machine_record(),
            "backends": {op: ops.choose(op, backend=self.backend).__name__ for op in KERNELS},
            "dtype": self.recipe.training.dtype,
            "seed": self.recipe.training.seed,
            "parameters": sum(p.numel() for p in self.decoder.parameters()),
            "training_documents": len(self._documents),
            "training_tokens": self._documents.num_tokens,
            "training_fingerprint": self._data,
            "validation_documents": len(self._held_out),
            "validation_bytes": int(self._held_out.num_bytes.sum()),
        }

    def restore(self, saved: SavedRun) -> None:
        """Go back to where `saved` was written.

        Raises:
            DataError: the training text or its tokenization has changed since.
            CheckpointError: the checkpoint is of another model.
        """
        if saved.data != self._data:
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

    def save(self, log_bytes: int) -> SavedRun:
        """Return what a checkpoint holds; the tensors are views, to be written before a step."""
        progress = Progress(
            steps_done=self.progress.steps_done,
            tokens_seen=self.progress.tokens_seen,
            position=self.progress.position,
            log_bytes=log_bytes,
        )
        return SavedRun(
            progress=progress,
            recipe=plain_sections(self.recipe),
            data=self._data,
            threads=torch.get_num_threads(),
            tensors=self.optimizer.tensors(),
        )

    def step(self) -> dict[str, Any]:
        """Take one optimizer step and return its record.

        Raises:
            RecipeError: the loss or the gradient is not finite.
        """
        recipe = self.recipe
        batches = [self._stream.next() for _ in range(recipe.training.accumulate)]
        num_targets = sum(packed.num_targets for packed in batches)
        loss, balance = 0.0, 0.0
        size = len(self._workers.decoders)
        for first in range(0, len(batches), size):
            together = batches[first : first + size]
            losses = self._workers.run(
                lambda decoder, packed: self._backward(decoder, packed, num_targets, len(batches)),
                together,
            )
            for number, (entropy, uneven) in enumerate(losses):
                self.optimizer.collect(number)
                loss += entropy / num_targets
                balance += uneven / len(batches)
        rate = learning_rate_at(
            self.progress.steps_done,
            recipe.training.steps,
            recipe.optimizer.learning_rate,
            recipe.schedule,
        )
        norm = self.optimizer.step(rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RecipeError(
                f"training diverged at step {self.progress.steps_done + 1}: the loss is {loss} and "
                f"the gradient norm {norm}; lower optimizer.learning_rate (now "
                f"{recipe.optimizer.learning_rate:g}) and start again or resume"
            )
        tokens = sum(len(packed.ids_M) for packed in batches)
        self.progress = Progress(
            steps_done=self.progress.steps_done + 1,
            tokens_seen=self.progress.tokens_seen + tokens,
            position=self._stream.position,
        )
        return {
            "event": "step",
            "step": self.progress.steps_done,
            "tokens_seen": self.progress.tokens_seen,
            "epoch": self.progress.position.epoch,
            "loss": loss,
            "balance_loss": balance,
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def _backward(
        self, decoder: Decoder, packed: PackedBatch, num_targets: int, num_batches: int
    ) -> tuple[float, float]:
        """Leave a batch's gradient in `decoder`; return its summed cross entropy and balance loss.

        The cross entropy is a mean over all tokens of the step, the balance loss a mean over its
        batches. They are kept apart: peers that add them up before averaging scale one by the
        other's count.
        """
        routing: list[Routing] = []
        batch = Batch.of(packed.lengths, backend=self.backend, routing=routing)
        hidden_MD = decoder(packed.ids_M, batch, hidden=True)
        entropy = summed_cross_entropy(hidden_MD, output_weight(decoder), packed.targets_M)
        total = entropy / num_targets
        uneven = 0.0
        if routing:
            balance = balance_loss(routing)
            total = total + self.recipe.model.aux_loss_coef / num_batches * balance
            uneven = balance.item()
        total.backward()
        return entropy.item(), uneven

    def validate(self) -> Validation:
        """Read the held-out documents."""
        return validate(
            self.decoder,
            self._held_out,
            sequence_tokens=self.recipe.data.sequence_tokens,
            batch_tokens=self.recipe.training.batch_tokens,
            backend=self.backend,
        )
