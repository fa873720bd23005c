"""What a run reads, tokenized beside it or prepared before it, behind one face.

Knows recipes and text, and nothing of models and steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jamba_lm.corpus.mixture import MixedPosition, MixedStream
from jamba_lm.corpus.training_text import TrainingText
from jamba_lm.data import (
    PackedBatch,
    PackedStream,
    Position,
    TokenizedDocuments,
    validation_batches,
)
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.token_cache import tokenized


class RunText:
    """The text of a run.

    Attributes:
        held_out: the documents to validate on.
        fingerprint: names the text, so that a resumed run can tell that it reads the same.
    """

    def __init__(self, recipe: Recipe, cache: Path) -> None:
        """Open or tokenize the text.

        Args:
            recipe: what to read.
            cache: folder to keep tokenized text in.

        Raises:
            RecipeError: the tokenizer has more tokens than the model.
            DataError: text is missing or unusable.
        """
        self._recipe = recipe
        self._prepared: TrainingText | None = None
        self._documents: TokenizedDocuments | None = None
        folder = tokenizer_folder(recipe)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > recipe.model.vocab_size:
            raise RecipeError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model a vocab_size of "
                f"{recipe.model.vocab_size:,}: raise model.vocab_size to {tokenizer.vocab_size}, "
                "or train a smaller tokenizer"
            )
        file = folder / "tokenizer.json" if folder.is_dir() else folder

        def read(what: str, paths: Sequence[str]) -> TokenizedDocuments:
            saved = cache / f"{what}.tokens.safetensors"
            return tokenized(
                [Path(path) for path in paths], tokenizer, file, cache=saved, what=what
            )

        if recipe.data.prepared:
            self._prepared = TrainingText(Path(recipe.data.prepared))
            self.fingerprint = self._prepared.fingerprint
        else:
            self._documents = read("training", recipe.data.train)
            self.fingerprint = self._documents.fingerprint()
        if recipe.data.validation:
            self.held_out = read("validation", recipe.data.validation)
        else:
            assert self._prepared is not None, "without a prepared folder the files are required"
            self.held_out = self._prepared.held_out

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return int(self.held_out.num_bytes.sum())

    def validation_batches(self) -> Iterator[PackedBatch]:
        """Yield the held-out documents, cut into pieces of the recipe's length."""
        return validation_batches(
            self.held_out,
            sequence_tokens=self._recipe.data.sequence_tokens,
            batch_tokens=self._recipe.training.batch_tokens,
        )

    def open_stream(
        self, position: Position | MixedPosition | None, reader: int = 0, readers: int = 1
    ) -> PackedStream | MixedStream:
        """Start reading batches at `position`, or from the beginning.

        Args:
            position: of the whole run.
            reader: which of those that share the batches this is.
            readers: how many they are.

        Raises:
            DataError: the position is of another kind of text.
        """
        sequence, batch = self._recipe.data.sequence_tokens, self._recipe.training.batch_tokens
        seed = self._recipe.training.seed
        if self._prepared is not None:
            if isinstance(position, Position):
                raise _other_kind()
            return self._prepared.open_stream(
                sequence_tokens=sequence,
                batch_tokens=batch,
                seed=seed,
                position=position,
                reader=reader,
                readers=readers,
            )
        assert self._documents is not None
        if isinstance(position, MixedPosition):
            raise _other_kind()
        return PackedStream(
            self._documents,
            sequence_tokens=sequence,
            batch_tokens=batch,
            seed=seed,
            position=position,
            reader=reader,
            readers=readers,
        )

    def record(self) -> dict[str, Any]:
        """Describe the text for the record of a run."""
        held_out = {
            "validation_documents": len(self.held_out),
            "validation_bytes": self.validation_bytes,
        }
        if self._prepared is not None:
            return {**self._prepared.record(), **held_out}
        assert self._documents is not None
        return {
            "training_documents": len(self._documents),
            "training_tokens": self._documents.num_tokens,
            "training_fingerprint": self.fingerprint,
            **held_out,
        }


def tokenizer_folder(recipe: Recipe) -> Path:
    """Return where the tokenizer of a run lies."""
    if recipe.data.prepared:
        return Path(recipe.data.prepared) / "tokenizer"
    return Path(recipe.data.tokenizer)


def _other_kind() -> DataError:
    return DataError(
        "the run to resume was reading text of another kind: go back to its data.train or "
        "data.prepared, or start in another --out folder"
    )
