"""A run on a prepared corpus: the same loop, other text, gone on with bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jamba_lm.corpus.preparation import prepare
from jamba_lm.corpus.recipe_file import build_corpus_recipe
from jamba_lm.errors import DataError, RecipeError
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.training.loop import train
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.recipe_record import to_toml
from tests.corpus.corpora import sentence_text, write_jsonl
from tests.training.tiny_run import log_of, write_tiny_run

TEXT = 'train = ["train.jsonl"]\nvalidation = ["validation.jsonl"]\ntokenizer = "tokenizer"\n'


def prepared_run(folder: Path, first: int = 0) -> Path:
    """Write a run whose text was prepared from two sources."""
    path = write_tiny_run(folder)
    path.write_text(path.read_text().replace(TEXT, 'prepared = "prepared"\n'))
    for name, start in (("web", first), ("books", first + 50)):
        write_jsonl(
            folder / f"{name}.jsonl", (sentence_text(n, 40) for n in range(start, start + 9))
        )
    sources = [
        {"name": "web", "files": ["web.jsonl"], "weight": 2},
        {"name": "books", "files": ["books.jsonl"]},
    ]
    sections = {
        "source": sources,
        "split": {"validation": 0.2},
        "tokens": {"tokenizer": "tokenizer"},
    }
    prepare(build_corpus_recipe(sections, folder), folder / "prepared")
    return path


def test_a_run_on_a_prepared_corpus_goes_on_bit_for_bit(tmp_path):
    recipe = load_recipe(prepared_run(tmp_path))
    whole = train(recipe, tmp_path / "whole")
    assert whole.finished
    assert whole.model_folder is not None
    assert load_tokenizer(whole.model_folder).vocab_size <= 400

    def stop(record: Mapping[str, Any]) -> None:
        if record.get("step") == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", report=stop)
    parts = train(recipe, tmp_path / "parts", resume="always")
    assert parts.model_folder is not None
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    weights = [folder / "model.safetensors" for folder in (whole.model_folder, parts.model_folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["weights"] == {"web": 2.0, "books": 1.0}
    assert load_recipe(tmp_path / "whole" / "recipe.toml") == recipe


def test_another_corpus_under_a_resumed_run_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    half = load_recipe(prepared_run(one), ["training.steps=6"])
    train(half, tmp_path / "run")
    prepared_run(other, first=200)
    (one / "prepared").rename(one / "old")
    (other / "prepared").rename(one / "prepared")
    with pytest.raises(DataError, match="not what this run was reading"):
        train(load_recipe(one / "recipe.toml"), tmp_path / "run", resume="always")


def test_files_may_be_held_out_in_place_of_the_prepared_ones(tmp_path):
    path = prepared_run(tmp_path)
    prepared = train(load_recipe(path), tmp_path / "prepared held out")
    own = load_recipe(path, ['data.validation=["validation.jsonl"]'])
    outcome = train(own, tmp_path / "own held out")
    record = json.loads((tmp_path / "own held out" / "run.json").read_text())
    texts = [json.loads(line)["text"] for line in (tmp_path / "validation.jsonl").open()]
    assert record["validation_documents"] == len(texts)
    assert record["validation_bytes"] == sum(len(text.encode()) for text in texts)
    assert load_recipe(tmp_path / "own held out" / "recipe.toml") == own
    # The same weights, measured on other text.
    assert prepared.model_folder is not None
    assert outcome.model_folder is not None
    weights = [one.model_folder / "model.safetensors" for one in (prepared, outcome)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    last = [log_of(tmp_path / name)[-1] for name in ("prepared held out", "own held out")]
    assert last[0]["event"] == last[1]["event"] == "validation"
    assert last[0]["bits_per_byte"] != last[1]["bits_per_byte"]


def test_a_recipe_has_one_kind_of_text(tmp_path):
    path = prepared_run(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.prepared and data\.train are both given"):
        load_recipe(path, ['data.train=["a.jsonl"]'])
    path.write_text(path.read_text().replace('prepared = "prepared"\n', ""))
    with pytest.raises(RecipeError, match=r"needs train.*or prepared"):
        load_recipe(path)
    assert "prepared" not in to_toml(load_recipe(write_tiny_run(tmp_path / "plain")))
