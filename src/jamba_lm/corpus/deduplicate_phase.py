"""The second phase: one task sees the fingerprints of all documents and says which stay.

Also fixes the split, for what is held out must not depend on what is a copy of what.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jamba_lm.corpus.columns import Array, Columns, new_columns
from jamba_lm.corpus.document import excerpt
from jamba_lm.corpus.duplicates import exact_copies, near_copies, sort_keys
from jamba_lm.corpus.plan import Plan
from jamba_lm.corpus.tally import Tally
from jamba_lm.errors import DataError

EXACT, NEAR = "exact duplicates", "near duplicates"


def deduplicate_task(plan: Plan, parts: Sequence[Columns], folder: Path) -> None:
    """Decide which documents of all parts stay.

    Args:
        plan: the preparation.
        parts: what the tasks of the first phase have left, in their order.
        folder: to be made: a column `kept` over the documents of all parts.

    Raises:
        DataError: a source has no usable document, or there is nothing to hold out.
        InputError: the system refused to write.
    """
    started = time.process_time()
    tally = Tally(plan.recipe.report.samples)
    _check_sources(plan, parts)
    every = _Every(plan, parts)
    options = plan.recipe.duplicates
    hashes = every.column("hashes")
    alive = np.ones(len(hashes), dtype=bool)
    if options.exact:
        alive = every.drop(tally, EXACT, exact_copies(hashes), alive)
    if options.near:
        signatures = every.column("signatures")
        alive = every.drop(tally, NEAR, near_copies(signatures, alive, options), alive)
    high, _ = sort_keys(hashes[alive])
    with new_columns(folder, {"kept": ("|u1", 1)}) as columns:
        columns.append("kept", alive.astype(np.uint8))
        columns.info = {
            "tally": tally.rows,
            "held_out_below": _split(high, plan.recipe.split.validation),
            "cpu_seconds": time.process_time() - started,
        }


def _check_sources(plan: Plan, parts: Sequence[Columns]) -> None:
    rows = Tally(plan.recipe.report.samples)
    for part in parts:
        rows.merge(part.info["tally"])
    for source in plan.recipe.source:
        read = rows.row(source.name, "read")
        if read["documents_in"] and not read["documents_out"]:
            reason, count = max(read["dropped"].items(), key=lambda item: (item[1], item[0]))
            sample = next(iter(read["samples"].get(reason, [])), {"place": "", "text": ""})
            raise DataError(
                f"source {source.name!r} has no usable document: {count:,} of "
                f"{read['documents_in']:,} are dropped as {reason!r}, such as {sample['place']} "
                f"({sample['text'][:80]}); check its files, format, field and encoding"
            )


class _Every:
    """The documents of all parts, numbered through in the order of the recipe."""

    def __init__(self, plan: Plan, parts: Sequence[Columns]) -> None:
        self._plan = plan
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part["ends"]) for part in parts)])
        self._units = self.column("units")
        self._positions = self.column("positions")

    def column(self, name: str) -> Array:
        return np.concatenate([part[name] for part in self._parts])

    def drop(self, tally: Tally, stage: str, first: Array, alive: Array) -> Array:
        """Drop what is not the first of its group, count it, and return what is left."""
        names = [source.name for source in self._plan.recipe.source]
        numbers = np.array([unit.source for unit in self._plan.units])[self._units]
        sizes = np.concatenate([np.diff(part["ends"], prepend=0) for part in self._parts])
        copies = alive & (first != np.arange(len(first)))
        for number, name in enumerate(names):
            mine = alive & (numbers == number)
            row = tally.row(name, stage)
            row["documents_in"] = int(mine.sum())
            row["bytes_in"] = int(sizes[mine].sum())
            row["documents_out"] = int((mine & ~copies).sum())
            row["bytes_out"] = int(sizes[mine & ~copies].sum())
        for copy in np.flatnonzero(copies).tolist():
            source, original = int(numbers[copy]), int(first[copy])
            other = int(numbers[original])
            reason = "within the source" if source == other else f"in {names[other]}"
            dropped = tally.row(names[source], stage)["dropped"]
            dropped[reason] = dropped.get(reason, 0) + 1
            key = self._hash(copy)
            if tally.wants(names[source], stage, reason, key):
                sample = {"key": key, **self._shown(copy), "kept": self._shown(original)}
                tally.show(names[source], stage, reason, sample)
        return alive & ~copies

    def _at(self, number: int) -> tuple[Columns, int]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[part], number - int(self._starts[part])

    def _hash(self, number: int) -> str:
        part, row = self._at(number)
        return bytes(part["hashes"][row]).hex()

    def _shown(self, number: int) -> dict[str, Any]:
        part, row = self._at(number)
        unit = self._plan.units[int(self._units[number])]
        end = int(part["ends"][row])
        start = int(part["ends"][row - 1]) if row else 0
        limit = self._plan.recipe.report.sample_characters
        # A character has up to four bytes; what is cut in two at the end is cut off.
        data = bytes(part["text"][start : min(end, start + 4 * limit + 4)])
        return {
            "place": f"{Path(unit.path).name}, document {int(self._positions[number]) + 1:,}",
            "text": excerpt(data.decode("utf-8", errors="ignore"), limit),
        }


def _split(high: Array, share: float) -> int:
    """Return the number below which the upper half of a held-out document's hash lies.

    Few documents may all fall on one side; then one is moved.
    """
    if not share:
        return 0
    if len(high) < 2:
        count = "no document is" if not len(high) else "one document is"
        raise DataError(
            f"{count} left, too few to hold out {share:.0%} of them: give more text, cut long "
            "files into documents with a source's separator, or set split.validation = 0"
        )
    bound = int(share * 2**64)
    smallest, largest = int(high.min()), int(high.max())
    if smallest == largest:
        return bound
    return min(max(bound, smallest + 1), largest)
