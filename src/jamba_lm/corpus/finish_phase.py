"""The last phase: what was made is described, and with that the corpus is there.

Writes the report, copies the tokenizer, and at the very end the manifest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jamba_lm.corpus.columns import Columns, refused_as_input_error
from jamba_lm.corpus.pack_phase import SHARDS, SIDES
from jamba_lm.corpus.plan import Plan
from jamba_lm.corpus.prepared import FORMAT, MANIFEST, TOKENIZER
from jamba_lm.corpus.recipe import result_digest
from jamba_lm.corpus.report import REPORT_HTML, REPORT_JSON, build_report
from jamba_lm.corpus.report_page import report_page
from jamba_lm.corpus.tokenize_phase import open_tokenizer, tokenizer_folder
from jamba_lm.files import make_folder, remove_leftovers, write_atomic, write_json


def finish_task(plan: Plan, done: Mapping[str, Sequence[Columns]], out: Path) -> None:
    """Describe what the other phases have made.

    Args:
        plan: the preparation.
        done: what the tasks of each phase have left.
        out: folder of the preparation.

    Raises:
        InputError: the system refused to write.
    """
    tokenizer, bos, eos = open_tokenizer(plan.recipe.tokens.tokenizer)
    _copy_tokenizer(tokenizer_folder(plan.recipe.tokens.tokenizer), out / TOKENIZER)
    sources = []
    for number, source in enumerate(plan.recipe.source):
        sides = {
            side: done["pack"][number * len(SIDES) + place].info["shards"]
            for place, side in enumerate(SIDES)
        }
        sources.append({"name": source.name, "weight": source.weight, **sides})
    contents = {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": bos,
        "eos_id": eos,
        "recipe": result_digest(plan.recipe.to_dict()),
        "sources": sources,
    }
    manifest = {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        **contents,
    }
    report = build_report(plan, done, sources)
    write_json(out / REPORT_JSON, report)
    page = report_page(report).encode("utf-8")
    write_atomic(out / REPORT_HTML, lambda file: _write(file, page))
    # No other task is at work any more: what is left was left by one that was killed.
    for folder in (out, out / SHARDS):
        remove_leftovers(folder)
    write_json(out / MANIFEST, manifest)


def _write(file: Any, data: bytes) -> None:
    file.write(data)


def _copy_tokenizer(folder: Path, target: Path) -> None:
    make_folder(target)
    with refused_as_input_error(target):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
                shutil.copyfile(path, target / path.name)
