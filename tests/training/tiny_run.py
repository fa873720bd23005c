"""A training run of a few seconds: a tiny model, a tiny tokenizer, a few documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_checkpoint import TINY_TEXT, write_tiny_tokenizer

# Fields of the log that say how long something took.
TIMES = ("seconds", "tokens_per_second", "mfu")

RECIPE = """
[model]
vocab_size = 400
d_model = 16
d_ff = 16
num_layers = 4
num_heads = 2
num_kv_heads = 1
attention_period = 4
attention_offset = 2
num_experts = 4
state_size = 4
dt_rank = 2
tie_embeddings = true
eos_ids = [2]
aux_loss_coef = 0.01

[data]
train = ["train.jsonl"]
validation = ["validation.jsonl"]
tokenizer = "tokenizer"
sequence_tokens = 16

[training]
steps = 12
batch_tokens = 48
accumulate = 2
seed = 7

[optimizer]
learning_rate = 0.01

[schedule]
warmup_steps = 3

[validation]
every_steps = 5

[checkpoint]
every_steps = 2
every_seconds = 0
"""


def write_tiny_run(folder: Path) -> Path:
    """Write the text, the tokenizer and the recipe of a run, and return the recipe's path."""
    (folder / "tokenizer").mkdir(parents=True)
    write_tiny_tokenizer(folder / "tokenizer")
    lines = [json.dumps({"text": line}) for line in TINY_TEXT.splitlines()]
    (folder / "train.jsonl").write_text("\n".join(lines * 3), encoding="utf-8")
    (folder / "validation.jsonl").write_text(lines[0], encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in record if key not in TIMES} for record in records]
