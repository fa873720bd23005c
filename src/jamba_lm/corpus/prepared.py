"""A prepared corpus, opened: its sources, their shards, and the tokenizer they were made with.

Checks that the folder is the one that its manifest describes. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.corpus.shard_file import Shard
from jamba_lm.errors import DataError
from jamba_lm.files import path_kind, read_json

MANIFEST = "corpus.json"
TOKENIZER = "tokenizer"
FORMAT = "jamba_lm corpus 1"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest says of a shard."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """What the manifest says of a source."""

    name: str
    weight: float
    train: tuple[ShardEntry, ...]
    validation: tuple[ShardEntry, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to train on."""
        return sum(shard.tokens for shard in self.train)


class PreparedCorpus:
    """The folder that `jamba data prepare` has written.

    Attributes:
        folder: where it is.
        fingerprint: names the contents; equal for the same recipe, files and tokenizer.
        vocab_size: of the tokenizer.
        bos_id: put before every piece of a document.
        eos_id: stands at the end of every document.
        sources: in the order of the recipe.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest and look at every shard's size.

        Raises:
            DataError: there is no corpus, it is unfinished or damaged, or a shard is missing or is
                not as long as it was.
        """
        self.folder = folder
        if path_kind(folder / MANIFEST) != "file":
            unfinished = path_kind(folder / "plan.json") == "file"
            raise DataError(
                f"the corpus in {str(folder)!r} is not finished: run its `jamba data prepare` again"
                if unfinished
                else f"no corpus in {str(folder)!r}: expected a folder that `jamba data prepare` "
                "has written"
            )
        manifest = read_json(folder / MANIFEST, "corpus manifest", DataError, 2**30)
        try:
            if manifest["format"] != FORMAT:
                raise self._damaged(f"its format is {manifest['format']!r}, expected {FORMAT!r}")
            self.fingerprint = str(manifest["fingerprint"])
            self.vocab_size = int(manifest["vocab_size"])
            self.bos_id = int(manifest["bos_id"])
            self.eos_id = int(manifest["eos_id"])
            self.sources = tuple(_source(source) for source in manifest["sources"])
        except (KeyError, TypeError, ValueError) as cause:
            raise self._damaged("it is not what a preparation writes") from cause
        for source in self.sources:
            for entry in (*source.train, *source.validation):
                self._check(entry)

    def _check(self, entry: ShardEntry) -> None:
        shard = self.open(entry)
        if (len(shard), shard.num_tokens) != (entry.documents, entry.tokens):
            raise DataError(
                f"{str(self.folder / entry.file)!r} has {len(shard):,} documents with "
                f"{shard.num_tokens:,} tokens, the manifest says {entry.documents:,} with "
                f"{entry.tokens:,}: was the folder changed? prepare the corpus again"
            )

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"the manifest {str(self.folder / MANIFEST)!r} is unusable: {reason}; prepare the "
            "corpus again"
        )

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that the tokens were made with."""
        return self.folder / TOKENIZER

    def open(self, entry: ShardEntry) -> Shard:
        """Map a shard into memory.

        Raises:
            DataError: it is missing or damaged.
        """
        return Shard(self.folder / entry.file)

    def verify(self) -> int:
        """Read every byte of every shard and return how many there are.

        Raises:
            DataError: a shard is not what was written.
        """
        count = 0
        for source in self.sources:
            for entry in (*source.train, *source.validation):
                path = self.folder / entry.file
                try:
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                        count += file.tell()
                except OSError as cause:
                    raise DataError(
                        f"cannot read {str(path)!r}: {cause.strerror or cause}"
                    ) from cause
                if digest != entry.sha256:
                    raise DataError(
                        f"{str(path)!r} is not what was written: its sha256 is {digest[:16]}..., "
                        f"expected {entry.sha256[:16]}...; prepare the corpus again"
                    )
        return count


def _source(value: Mapping[str, Any]) -> PreparedSource:
    return PreparedSource(
        str(value["name"]),
        float(value["weight"]),
        tuple(ShardEntry(**entry) for entry in value["train"]),
        tuple(ShardEntry(**entry) for entry in value["validation"]),
    )
