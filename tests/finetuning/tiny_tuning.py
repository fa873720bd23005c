"""A fine-tuning run of a second: a tiny chat model, a few records, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_checkpoint import CHATML_TEMPLATE, write_tiny_checkpoint

TURNS = [
    ("Where do the boats go?", "Nobody knew."),
    ("How many boats?", "12 boats became 13."),
    ("Who counted them?", "The children walked along the river and counted the boats."),
    ("Was it quiet?", "The town was quiet again."),
]
RECIPE = """
[model]
base = "model"

[data]
train = ["train.jsonl"]
validation = ["validation.jsonl"]
sequence_tokens = 96

{adapter}
[training]
steps = 6
batch_tokens = 128
seed = 7
dtype = "fp32"

[optimizer]
learning_rate = 0.01

[schedule]
warmup_steps = 1

[validation]
every_steps = 3

[checkpoint]
every_steps = 2
every_seconds = 0
"""
ADAPTER = """
[adapter]
rank = 2
alpha = 4
"""


def conversation(*turns: tuple[str, str], system: str | None = None) -> dict[str, Any]:
    """Return a record of messages."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write_jsonl(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(one, ensure_ascii=False) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tiny_tuning(folder: Path, *, adapter: bool = True) -> Path:
    """Write a model, the data and a recipe, and return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_checkpoint(folder / "model", CHATML_TEMPLATE)
    records: list[Any] = [conversation(turn) for turn in TURNS]
    records += [conversation(*TURNS[:2], system="You count.")]
    records += [{"prompt": f"{question} ", "completion": answer} for question, answer in TURNS]
    records += [{"text": "Once upon a time there was a river."}]
    write_jsonl(folder / "train.jsonl", records)
    write_jsonl(folder / "validation.jsonl", [conversation(TURNS[3], TURNS[1])])
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(adapter=ADAPTER if adapter else ""), encoding="utf-8")
    return path
