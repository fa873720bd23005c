"""Small corpora on disk, for tests: made of words, prepared in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jamba_lm.corpus.pack_phase import SIDES
from jamba_lm.corpus.preparation import prepare
from jamba_lm.corpus.prepared import FORMAT, MANIFEST, PreparedCorpus
from jamba_lm.corpus.recipe import CorpusRecipe
from jamba_lm.corpus.recipe_file import build_corpus_recipe
from jamba_lm.corpus.shard_file import write_shard
from jamba_lm.files import write_json
from tests.text.folders import trained_folder

# fmt: off
WORDS = [
    "river", "stone", "bread", "winter", "lantern", "harbour", "ladder", "engine", "mountain",
    "garden", "letter", "window", "captain", "silver", "thunder", "market", "village", "bridge",
    "forest", "copper", "morning", "island", "shadow", "kettle",
]
# fmt: on
BOS, EOS = 1, 2


def sentence_text(seed: int, num_words: int = 80) -> str:
    """Return a text that no filter has anything against, another for each seed."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(num_words)]
    lines = [
        f"The {' '.join(words[place : place + 8])} of the {words[place]} and {draw.random():.6f} "
        "that they have with it."
        for place in range(0, num_words, 8)
    ]
    return "\n".join(lines)


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write documents, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def recipe_of(folder: Path, **sections: Any) -> CorpusRecipe:
    """Build a recipe with paths relative to `folder`, and a small tokenizer."""
    tokens = {"tokenizer": str(trained_folder("byte-level")), **sections.pop("tokens", {})}
    return build_corpus_recipe({**sections, "tokens": tokens}, folder)


def prepared(folder: Path, out: str = "out", **sections: Any) -> PreparedCorpus:
    """Prepare what `sections` say, in a folder beside the texts."""
    outcome = prepare(recipe_of(folder, **sections), folder / out)
    assert outcome.corpus is not None
    return outcome.corpus


def report_of(corpus: PreparedCorpus) -> dict[str, Any]:
    """Return the report of a preparation."""
    report: dict[str, Any] = json.loads((corpus.folder / "report.json").read_text("utf-8"))
    return report


def stage_of(corpus: PreparedCorpus, source: str, stage: str) -> dict[str, Any]:
    """Return what the report says of one stage."""
    (found,) = [one for one in report_of(corpus)["sources"] if one["name"] == source]
    (row,) = [one for one in found["stages"] if one["stage"] == stage]
    return row


def texts_of(corpus: PreparedCorpus, side: str = "train") -> dict[str, list[list[int]]]:
    """Return the documents of each source, as ids."""
    return {
        source.name: [
            shard.ids[first:last].tolist()
            for entry in getattr(source, side)
            for shard in [corpus.open(entry)]
            for first, last in zip(shard.starts[:-1], shard.starts[1:], strict=True)
        ]
        for source in corpus.sources
    }


def token_corpus(
    folder: Path,
    lengths: dict[str, Sequence[Sequence[int]]],
    weights: dict[str, float] | None = None,
) -> PreparedCorpus:
    """Write a prepared corpus by hand, in which no two tokens are alike.

    Args:
        folder: to write to.
        lengths: for each source, for each shard, the tokens of its documents.
        weights: 1 for a source that is not named.
    """
    (folder / "shards").mkdir(parents=True)
    sources, token = [], 100
    for name, shards in lengths.items():
        entries = []
        for number, sizes in enumerate(shards):
            starts = np.cumsum([0, *sizes]).astype("<i8")
            total = int(starts[-1])
            ids = np.arange(token, token + total, dtype="<u4")
            token += total
            file = f"shards/{name}-train-{number:05d}.safetensors"
            digest = write_shard(
                folder / file,
                {
                    "ids": ("U32", (total,)),
                    "starts": ("I64", (len(sizes) + 1,)),
                    "num_bytes": ("I64", (len(sizes),)),
                    "hashes": ("U8", (len(sizes), 16)),
                },
                [ids, starts, np.diff(starts), np.zeros((len(sizes), 16), np.uint8)],
                {},
            )
            entries.append(
                {
                    "file": file,
                    "documents": len(sizes),
                    "tokens": total,
                    "text_bytes": total,
                    "sha256": digest,
                }
            )
        weight = (weights or {}).get(name, 1.0)
        sources.append({"name": name, "weight": weight, SIDES[0]: entries, SIDES[1]: []})
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "fingerprint": "by hand",
            "vocab_size": token,
            "bos_id": BOS,
            "eos_id": EOS,
            "recipe": "",
            "sources": sources,
        },
    )
    return PreparedCorpus(folder)
