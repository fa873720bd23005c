"""The first phase: documents are read, pass the stages of their source, and are fingerprinted.

Knows nothing of other tasks; what it leaves behind is a folder of columns.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jamba_lm.corpus.columns import ColumnWriter, new_columns
from jamba_lm.corpus.document import Document, Drop, Unusable, excerpt
from jamba_lm.corpus.minhash import MinHash
from jamba_lm.corpus.plan import Plan, Unit, check_unchanged
from jamba_lm.corpus.reading import read_file
from jamba_lm.corpus.recipe import CorpusRecipe
from jamba_lm.corpus.stages import Stage, make_stages
from jamba_lm.corpus.tally import Tally
from jamba_lm.errors import DataError

HASH_BYTES = 16
READ = "read"


def text_hash(data: bytes) -> bytes:
    """Name a text by its UTF-8."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def read_task(plan: Plan, folder: Path, index: int, progress: Callable[[int], None]) -> None:
    """Read the units of one task into `folder`.

    Args:
        plan: the preparation.
        folder: to be made.
        index: number of the task.
        progress: told of the bytes that were read.

    Raises:
        DataError: a file has changed or cannot be read, or a document is unusable and the recipe
            wants to stop at that.
        InputError: the system refused to write.
    """
    recipe = plan.recipe
    kinds = {
        "text": ("|u1", 1),
        "ends": ("<i8", 1),
        "hashes": ("|u1", HASH_BYTES),
        "units": ("<i4", 1),
        "positions": ("<i8", 1),
    }
    minhash = MinHash(recipe.duplicates) if recipe.duplicates.near else None
    if minhash:
        kinds["signatures"] = ("<u4", minhash.size)
    started = time.process_time()
    with new_columns(folder, kinds) as columns:
        reader = _Reader(recipe, columns, minhash)
        first, last = plan.tasks[index]
        for number in range(first, last):
            reader.read(number, plan.units[number])
            progress(plan.units[number].num_bytes)
        columns.info = {
            "tally": reader.tally.rows,
            "stage_seconds": reader.stage_seconds,
            "cpu_seconds": time.process_time() - started,
        }


class _Reader:
    """Reads units, one after the other, and writes what is kept."""

    def __init__(
        self, recipe: CorpusRecipe, columns: ColumnWriter, minhash: MinHash | None
    ) -> None:
        self.tally = Tally(recipe.report.samples)
        self.stage_seconds: dict[str, float] = {}
        self._recipe = recipe
        self._columns = columns
        self._minhash = minhash
        self._stages = make_stages(recipe)
        self._end = 0

    def read(self, number: int, unit: Unit) -> None:
        source = self._recipe.source[unit.source]
        stages = [(name, self._stages[name]) for name in source.stages]
        before = {name: dict(stage.counts) for name, stage in stages}
        check_unchanged(unit)
        for record in self._records(unit):
            if isinstance(record, Unusable):
                self._unusable(source.name, unit, record)
            else:
                self._document(source.name, number, record, stages)
        # A file that was written to while it was read is neither the old one nor the new one.
        check_unchanged(unit)
        for name, stage in stages:
            new = {
                key: count - before[name].get(key, 0)
                for key, count in stage.counts.items()
                if count != before[name].get(key, 0)
            }
            self.tally.count(source.name, name, new)

    def _records(self, unit: Unit) -> Iterator[Document | Unusable]:
        source, limits = self._recipe.source[unit.source], self._recipe.documents
        if source.format == "datatrove":
            from jamba_lm.corpus.datatrove_reading import read_input

            return read_input(unit.path, source, limits)
        return read_file(Path(unit.path), source, limits)

    def _unusable(self, source: str, unit: Unit, record: Unusable) -> None:
        if self._recipe.documents.unusable == "stop":
            raise DataError(
                f"{record.place} in {unit.path!r} is unusable ({record.reason}): {record.detail}; "
                'mend it, or set documents.unusable = "drop" to count it and go on'
            )
        sample = {"key": record.place, "place": record.place, "text": record.detail}
        self.tally.dropped(source, READ, record.reason, record.num_bytes, sample)

    def _document(
        self, source: str, number: int, document: Document, stages: Sequence[tuple[str, Stage]]
    ) -> None:
        text = document.text
        size = len(text.encode("utf-8"))
        self.tally.kept(source, READ, size, size)
        for name, stage in stages:
            started = time.thread_time()
            after = stage.apply(text)
            self._spent(name, started)
            if isinstance(after, str) and not after.strip():
                after = Drop("nothing left")
            if isinstance(after, Drop):
                self._drop(source, name, after.reason, document, text, size)
                return
            before, text = size, after
            size = len(text.encode("utf-8"))
            self.tally.kept(source, name, before, size)
        self._keep(number, document, text)

    def _spent(self, name: str, started: float) -> None:
        seconds = time.thread_time() - started
        self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds

    def _drop(
        self, source: str, stage: str, reason: str, document: Document, text: str, size: int
    ) -> None:
        sample = {
            "key": text_hash(text.encode("utf-8")).hex(),
            "place": document.place,
            "text": excerpt(text, self._recipe.report.sample_characters),
        }
        self.tally.dropped(source, stage, reason, size, sample)

    def _keep(self, number: int, document: Document, text: str) -> None:
        data = text.encode("utf-8")
        self._end += len(data)
        columns = self._columns
        columns.append("text", np.frombuffer(data, np.uint8))
        columns.append("ends", np.array([self._end], np.int64))
        columns.append("hashes", np.frombuffer(text_hash(data), np.uint8))
        columns.append("units", np.array([number], np.int32))
        columns.append("positions", np.array([document.position], np.int64))
        if self._minhash:
            started = time.thread_time()
            columns.append("signatures", self._minhash.signature(text))
            self._spent("near-duplicate signatures", started)
