"""The fourth phase: the tokens of one source and one side of the split become shards.

Documents lie in the order of their hashes, which is a shuffle that does not depend on how the
work was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jamba_lm.corpus.columns import Array, Columns, new_columns, refused_as_input_error
from jamba_lm.corpus.duplicates import sort_keys
from jamba_lm.corpus.plan import Plan
from jamba_lm.corpus.read_phase import HASH_BYTES
from jamba_lm.corpus.shard_file import write_shard
from jamba_lm.files import make_folder

SHARDS = "shards"
SIDES = ("train", "validation")
_CODES = {2: "U16", 4: "U32"}


def pack_task(
    plan: Plan, parts: Sequence[Columns], held_out_below: int, index: int, out: Path, folder: Path
) -> None:
    """Write the shards of one source and one side.

    Args:
        plan: the preparation.
        parts: what the tasks of the third phase have left, in their order.
        held_out_below: as the second phase found it.
        index: number of the source, times two, plus the number of the side.
        out: folder of the preparation.
        folder: to be made: the list of the shards.

    Raises:
        InputError: the system refused to write.
    """
    number, side = divmod(index, len(SIDES))
    name = plan.recipe.source[number].name
    documents = _Documents(parts, number, held_out_below, held_out=bool(side))
    make_folder(out / SHARDS)
    shards = []
    with new_columns(folder, {}) as columns, refused_as_input_error(out / SHARDS):
        for count, rows in enumerate(documents.runs(plan.recipe.tokens.shard_tokens)):
            file = f"{SHARDS}/{name}-{SIDES[side]}-{count:05d}.safetensors"
            shards.append({"file": file, **documents.write(out / file, rows)})
        columns.info = {"source": name, "side": SIDES[side], "shards": shards}


class _Documents:
    """The documents of one source and one side in all parts, in the order of their hashes."""

    def __init__(
        self, parts: Sequence[Columns], source: int, held_out_below: int, *, held_out: bool
    ) -> None:
        self._ids = [part["ids"] for part in parts]
        where, starts, lengths, sizes, hashes = [], [], [], [], []
        for number, part in enumerate(parts):
            mine = np.flatnonzero(part["sources"] == source)
            high, _ = sort_keys(part["hashes"][mine])
            mine = mine[(high < np.uint64(held_out_below)) == held_out]
            where.append(np.full(len(mine), number))
            starts.append((np.cumsum(part["lengths"]) - part["lengths"])[mine])
            lengths.append(part["lengths"][mine])
            sizes.append(part["num_bytes"][mine])
            hashes.append(part["hashes"][mine])
        every = np.concatenate(hashes)
        high, low = sort_keys(every)
        order = np.lexsort((np.arange(len(high)), low, high))
        self._where = np.concatenate(where)[order]
        self._starts = np.concatenate(starts)[order]
        self._lengths = np.concatenate(lengths)[order]
        self._sizes = np.concatenate(sizes)[order]
        self._hashes = every[order]

    def runs(self, shard_tokens: int) -> Iterator[slice]:
        """Cut the documents into runs of about that many tokens, at least one document each."""
        ends = np.cumsum(self._lengths)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + shard_tokens, side="right"))
            last = max(last, first + 1)
            yield slice(first, last)
            first = last

    def write(self, path: Path, rows: slice) -> dict[str, Any]:
        """Write one shard and describe it."""
        lengths = self._lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        code = _CODES[self._ids[0].dtype.itemsize]
        count = len(lengths)
        specs = {
            "ids": (code, (int(starts[-1]),)),
            "starts": ("I64", (count + 1,)),
            "num_bytes": ("I64", (count,)),
            "hashes": ("U8", (count, HASH_BYTES)),
        }

        def pieces() -> Iterator[Array]:
            for where, start, length in zip(
                self._where[rows].tolist(),
                self._starts[rows].tolist(),
                lengths.tolist(),
                strict=True,
            ):
                yield self._ids[where][start : start + length]
            yield starts
            yield self._sizes[rows].astype("<i8")
            yield self._hashes[rows]

        digest = write_shard(path, specs, pieces(), {})
        return {
            "documents": count,
            "tokens": int(starts[-1]),
            "text_bytes": int(self._sizes[rows].sum()),
            "sha256": digest,
        }
