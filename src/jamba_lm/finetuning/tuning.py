"""A fine-tuning run: from a finished model and a file of examples to another model, or an adapter.

Knows no command line. The steps are those of `training/loop.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jamba_lm.checkpoint.adapter_writer import write_adapter
from jamba_lm.checkpoint.huggingface import DTYPES, write_decoder
from jamba_lm.corpus.mixture import MixedPosition
from jamba_lm.data import PackedBatch, Position
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.files import make_folder
from jamba_lm.finetuning.coverage import Share, Tried, shares, try_gradients
from jamba_lm.finetuning.examples import ExampleRules, Examples, read_examples
from jamba_lm.finetuning.linears import chosen_places
from jamba_lm.finetuning.low_rank import (
    as_adapter,
    draw_values,
    insert,
    let_gradients_through,
    name_pass,
)
from jamba_lm.finetuning.packing import ExampleStream, batches_in_order
from jamba_lm.finetuning.recipe import TUNING_SECTIONS, TuningRecipe
from jamba_lm.finetuning.recipe_file import EMBEDDED
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.model.decoder import Decoder
from jamba_lm.presets import embedded_model_path
from jamba_lm.quantization.rewrite import dequantize_decoder
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from jamba_lm.text.tokenizer_copy import copy_tokenizer_files
from jamba_lm.training.loop import Outcome, Report, Resume, train
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.segments import PassProgress, nobody
from jamba_lm.training.task import Start

logger = logging.getLogger(__name__)

ADAPTER, MODEL = "adapter", "model"


class TuningText:
    """The examples of a fine-tuning run. See `training.task.Text`."""

    def __init__(self, recipe: TuningRecipe, tokenizer: Tokenizer) -> None:
        """Read and tokenize both sides of the split.

        Raises:
            DataError: a file is unusable, or a record is bad and bad ones are refused.
            TokenizerError: the tokenizer marks no beginnings or ends.
        """
        self._recipe = recipe
        data = recipe.data
        rules = ExampleRules(
            data.sequence_tokens,
            last_answer_only=data.answers == "last",
            drop_bad=data.bad_records == "dropped",
            drop_duplicates=data.duplicates == "dropped",
        )
        held_out, digests = read_examples(
            [Path(one) for one in data.validation], tokenizer, rules, "validation"
        )
        self.held_out = held_out
        self.training, _ = read_examples(
            [Path(one) for one in data.train], tokenizer, rules, "training", known=digests
        )
        self.fingerprint = self.training.fingerprint()

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the held-out answers."""
        return self.held_out.num_bytes

    def open_stream(
        self, position: Position | MixedPosition | None, reader: int = 0, readers: int = 1
    ) -> ExampleStream:
        """Start reading batches at `position`, or from the beginning; one process reads them all.

        Raises:
            DataError: the position is of another kind of text.
        """
        assert (reader, readers) == (0, 1), "`training.loop` lets no second process in"
        if isinstance(position, MixedPosition):
            raise DataError("the run to resume was reading a prepared corpus, and not examples")
        return ExampleStream(
            self.training.examples,
            batch_tokens=self._recipe.training.batch_tokens,
            seed=self._recipe.training.seed,
            position=position,
        )

    def validation_batches(self) -> Iterator[PackedBatch]:
        """Yield every held-out example once."""
        return batches_in_order(self.held_out.examples, self._recipe.training.batch_tokens)

    def record(self) -> dict[str, Any]:
        """Describe the examples for the record of a run."""
        return {"training": _described(self.training), "validation": _described(self.held_out)}


def _described(side: Examples) -> dict[str, Any]:
    return {
        "records": dict(side.counts),
        "examples": len(side.examples),
        "tokens": side.num_tokens,
        "learned_tokens": side.num_learned,
    }


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is ready before the first step, to be shown.

    Attributes:
        shares: what of the model is trained.
        tried: what a first pass through the adapters showed; None without adapters.
        text: what is read.
        trained: values that the optimizer moves.
        total: values that the model has, adapters apart.
    """

    shares: list[Share]
    tried: Tried | None
    text: TuningText

    @property
    def trained(self) -> int:
        """Values that the optimizer moves."""
        return sum(share.trained for share in self.shares)

    @property
    def total(self) -> int:
        """Values that the model has, adapters apart."""
        return sum(share.values[0] for share in self.shares)


class Tuning:
    """Fine-tuning as a kind of training run. See `training.task.Task`."""

    def __init__(self, recipe: TuningRecipe, backend: str | None = None) -> None:
        """Load the model, read the data, put adapters in and try them.

        Raises:
            CheckpointError: no sound checkpoint.
            RecipeError: the model cannot be trained as the recipe says.
            DataError: as in `TuningText`.
        """
        self._recipe = recipe
        base = recipe.model.base
        self._source = embedded_model_path() if base == EMBEDDED else Path(base)
        tokenizer = load_tokenizer(self._source)
        text = TuningText(recipe, tokenizer)
        model = load(self._source, quantize=recipe.model.quantize or None)
        self._dtype, self._config = model.dtype, model.config
        if tokenizer.vocab_size > self._config.vocab_size:
            raise RecipeError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model a vocab_size of "
                f"{self._config.vocab_size:,}: do the two belong together?"
            )
        self._decoder = model.decoder
        self.output = MODEL if recipe.adapter is None else ADAPTER
        tried = self._make_trainable(model, text, backend)
        self.prepared = Prepared(shares(self._decoder), tried, text)
        unknown = text.training.turn_ends - set(tokenizer.eos_ids)
        if unknown:
            names = ", ".join(str(tokenizer.token_name(one)) for one in sorted(unknown))
            logger.warning(
                "answers end with %s, which is no stop token of this model: add its id to "
                "eos_token_id in generation_config.json, or generation goes on behind it",
                names,
            )

    def _make_trainable(
        self, model: LanguageModel, text: TuningText, backend: str | None
    ) -> Tried | None:
        recipe, decoder = self._recipe, self._decoder
        section = recipe.adapter
        if section is None:
            if model.scheme is not None:
                raise RecipeError(
                    f"{recipe.model.base} is quantised, and packed weights cannot be trained: add "
                    "an [adapter] section, or start from the original model"
                )
            # Weights in the memory map of their file cannot be written to.
            _own_memory(decoder)
            return None
        # The loss multiplies by the output matrix in pieces, and rows of both are few.
        dequantize_decoder(decoder, layers=False)
        places = chosen_places(decoder, section.targets)
        let_gradients_through(decoder)
        insert(decoder, places, rank=section.rank, scale=section.scale, dropout=section.dropout)
        decoder.to(DTYPES[recipe.training.dtype])
        name_pass(decoder, 0, recipe.training.seed)
        first = text.open_stream(None).next()
        rows = recipe.training.segment_tokens or recipe.training.batch_tokens
        tried = try_gradients(decoder, first, rows, backend)
        # Drawn last, and in float32: master weights are taken from them.
        draw_values(decoder, recipe.training.seed)
        return tried

    def start(self, cache: Path) -> Start:
        """Return the model and the data, made ready."""
        seed, section = self._recipe.training.seed, self._recipe.adapter

        def before_pass(decoder: Decoder, number: int) -> None:
            name_pass(decoder, number, seed)

        record = {
            "base": self._recipe.model.base,
            "trained": self.prepared.trained,
            "unreached_adapters": len(self.prepared.tried.unreached) if self.prepared.tried else 0,
        }
        dropped = section is not None and section.dropout > 0
        return Start(self._decoder, self.prepared.text, before_pass if dropped else None, record)

    def export(self, optimizer: MasterAdamW, folder: Path) -> None:
        """Write the adapter in PEFT's format, or the whole model with its tokenizer."""
        section, masters = self._recipe.adapter, optimizer.masters()
        if section is not None:
            adapter = as_adapter(self._decoder, masters, str(self._source))
            write_adapter(folder, adapter, self._config, alpha=section.alpha, rslora=section.rslora)
            return
        write_decoder(folder, self._config, masters, dtype=self._dtype, overwrite=True)
        make_folder(folder)
        copy_tokenizer_files(self._source, folder)


def _own_memory(decoder: Decoder) -> None:
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def finetune(
    recipe: TuningRecipe,
    folder: Path,
    tuning: Tuning,
    *,
    resume: Resume = "never",
    backend: str | None = None,
    report: Report = lambda record: None,
    pass_progress: PassProgress = nobody,
    peak_flops: float | None = None,
) -> Outcome:
    """Carry out `recipe` in `folder`, from the start or from the newest checkpoint there.

    Arguments and errors are those of `training.loop.train`; `tuning` is the recipe made ready.
    """
    return train(
        recipe,
        folder,
        task=tuning,
        # Whether there is an adapter is no default that an earlier version could have left out.
        kinds={name: kind for name, kind in TUNING_SECTIONS.items() if name != "adapter"},
        resume=resume,
        backend=backend,
        report=report,
        pass_progress=pass_progress,
        peak_flops=peak_flops,
    )
