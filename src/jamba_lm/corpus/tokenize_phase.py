"""The third phase: documents that stay become tokens.

Knows one part of the documents, and nothing of shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jamba_lm.corpus.columns import Array, Columns, new_columns
from jamba_lm.corpus.document import excerpt
from jamba_lm.corpus.plan import Plan
from jamba_lm.corpus.read_phase import HASH_BYTES
from jamba_lm.corpus.recipe import DEMO_TOKENIZER
from jamba_lm.corpus.tally import Tally
from jamba_lm.errors import DataError
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer

KEPT = "kept"


def tokenizer_folder(name: str) -> Path:
    """Return where the tokenizer of a recipe lies."""
    if name == DEMO_TOKENIZER:
        return Path(__file__).parents[1] / "embedded"
    return Path(name)


def open_tokenizer(name: str) -> tuple[Tokenizer, int, int]:
    """Return a recipe's tokenizer, its beginning-of-sequence and its end-of-text token.

    Raises:
        TokenizerError: it is missing or malformed.
        DataError: it has no token to mark beginnings or ends with.
    """
    tokenizer = load_tokenizer(tokenizer_folder(name))
    if tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise DataError(
            "the tokenizer names no beginning-of-sequence or no end token; documents are kept "
            "apart by them, so give both in its tokenizer_config.json"
        )
    return tokenizer, tokenizer.bos_id, tokenizer.eos_ids[0]


def token_kind(vocab_size: int) -> tuple[str, str]:
    """Return the type of ids, as numpy and as a shard call it."""
    return ("<u2", "U16") if vocab_size <= 2**16 else ("<u4", "U32")


def tokenize_task(
    plan: Plan, part: Columns, kept: Array, folder: Path, progress: Callable[[int], None]
) -> None:
    """Tokenize the documents of one part that stay.

    Args:
        plan: the preparation.
        part: what a task of the first phase has left.
        kept: whether each of its documents stays.
        folder: to be made.
        progress: told of the bytes that were tokenized.

    Raises:
        TokenizerError: the tokenizer is unusable.
        InputError: the system refused to write.
    """
    recipe = plan.recipe
    started = time.process_time()
    tokenizer, _, end = open_tokenizer(recipe.tokens.tokenizer)
    kind, _ = token_kind(tokenizer.vocab_size)
    kinds = {
        "ids": (kind, 1),
        "lengths": ("<i8", 1),
        "num_bytes": ("<i8", 1),
        "hashes": ("|u1", HASH_BYTES),
        "sources": ("<i4", 1),
    }
    tally = Tally(recipe.report.samples)
    ends, text, hashes, units = (part[name] for name in ("ends", "text", "hashes", "units"))
    starts = np.concatenate([[0], ends[:-1]])
    with new_columns(folder, kinds) as columns:
        for row in np.flatnonzero(kept).tolist():
            data = bytes(text[starts[row] : ends[row]])
            document = data.decode("utf-8")
            ids = tokenizer.encode(document, add_bos=False)
            number = plan.units[int(units[row])].source
            columns.append("ids", np.array([*ids, end], dtype=kind))
            columns.append("lengths", np.array([len(ids) + 1], np.int64))
            columns.append("num_bytes", np.array([len(data)], np.int64))
            columns.append("hashes", np.asarray(hashes[row]))
            columns.append("sources", np.array([number], np.int32))
            name, key = recipe.source[number].name, bytes(hashes[row]).hex()
            tally.kept(name, KEPT, len(data), len(data))
            if tally.wants(name, KEPT, KEPT, key):
                unit = plan.units[int(units[row])]
                tally.show(
                    name,
                    KEPT,
                    KEPT,
                    {
                        "key": key,
                        "place": f"{Path(unit.path).name}, document "
                        f"{int(part['positions'][row]) + 1:,}",
                        "text": excerpt(document, recipe.report.sample_characters),
                    },
                )
            progress(len(data))
        columns.info = {"tally": tally.rows, "cpu_seconds": time.process_time() - started}
