"""A prepared corpus as a training run reads it: batches, held-out documents, and what it is.

Knows nothing of models and steps; a run keeps the position and the fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jamba_lm.corpus.mixture import MixedPosition, MixedStream, held_out_documents
from jamba_lm.corpus.prepared import PreparedCorpus
from jamba_lm.data import TokenizedDocuments
from jamba_lm.errors import DataError


class TrainingText:
    """A prepared folder, opened for a run.

    Attributes:
        corpus: what there is.
    """

    def __init__(self, folder: Path, *, weights: Mapping[str, float] | None = None) -> None:
        """Open the folder.

        Args:
            folder: that `jamba data prepare` has written.
            weights: of sources, by name, in place of the corpus' own.

        Raises:
            DataError: there is no corpus, or it is unfinished or damaged.
        """
        self.corpus = PreparedCorpus(folder)
        self._weights = dict(weights or {})

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer to copy beside a model that learns from this."""
        return self.corpus.tokenizer_folder

    @property
    def fingerprint(self) -> str:
        """Name the contents, so that a resumed run can tell that it reads the same text."""
        return self.corpus.fingerprint

    @cached_property
    def held_out(self) -> TokenizedDocuments:
        """The documents to validate on.

        Raises:
            DataError: there are none.
        """
        return held_out_documents(self.corpus)

    def open_stream(
        self,
        *,
        sequence_tokens: int,
        batch_tokens: int,
        seed: int,
        position: MixedPosition | None = None,
        reader: int = 0,
        readers: int = 1,
    ) -> MixedStream:
        """Start reading batches; see `MixedStream`.

        Raises:
            DataError: a source has no documents, or the position is of another corpus.
            RecipeError: a weight is impossible.
        """
        return MixedStream(
            self.corpus,
            sequence_tokens=sequence_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            position=position,
            weights=self._weights,
            reader=reader,
            readers=readers,
        )

    def record(self) -> dict[str, Any]:
        """Describe what is learned from, for the record of a run."""
        sources = self.corpus.sources
        return {
            "corpus": str(self.corpus.folder),
            "training_fingerprint": self.fingerprint,
            "training_documents": sum(one.documents for s in sources for one in s.train),
            "training_tokens": sum(source.num_tokens for source in sources),
            "weights": {s.name: self._weights.get(s.name, s.weight) for s in sources},
        }

    def check_resumed(self, fingerprint: str) -> None:
        """Make sure that a run goes on with the text that it was reading.

        Raises:
            DataError: it is another.
        """
        if fingerprint != self.fingerprint:
            raise DataError(
                f"the corpus in {str(self.corpus.folder)!r} is not what this run was reading: "
                "bring the old one back, or start in another --out folder"
            )
