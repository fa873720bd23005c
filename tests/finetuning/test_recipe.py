"""What a fine-tuning recipe may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_lm.errors import RecipeError
from jamba_lm.finetuning.recipe_file import load_tuning_recipe
from jamba_lm.training.recipe_record import to_toml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LEAST = """
[model]
base = "demo"
[data]
train = ["train.jsonl"]
validation = ["validation.jsonl"]
[training]
steps = 200
[optimizer]
learning_rate = 1e-4
"""


def load(folder: Path, text: str, changes: list[str] | None = None):
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_tuning_recipe(path, changes or [])


def test_without_an_adapter_section_all_weights_are_trained(tmp_path):
    recipe = load(tmp_path, LEAST)
    assert recipe.adapter is None
    assert recipe.optimizer.weight_decay == 0.0
    assert recipe.data.train == (str(tmp_path / "train.jsonl"),)
    assert load(tmp_path, LEAST, ["adapter.rank=4"]).adapter.rank == 4


def test_what_is_written_down_is_read_as_the_same_recipe(tmp_path):
    changes = ["adapter.rank=4", 'adapter.targets=["mamba"]', "model.quantize=int4"]
    for recipe in (load(tmp_path, LEAST), load(tmp_path, LEAST, changes)):
        (tmp_path / "again").mkdir(exist_ok=True)
        assert load(tmp_path / "again", to_toml(recipe)) == recipe


def test_the_scale_is_that_of_the_papers(tmp_path):
    plain = load(tmp_path, LEAST, ["adapter.rank=16", "adapter.alpha=8"]).adapter
    stable = load(
        tmp_path, LEAST, ["adapter.rank=16", "adapter.alpha=8", "adapter.rslora=true"]
    ).adapter
    assert (plain.scale, stable.scale) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["adapter.rank=0"], "a whole number from 1"),
        (["adapter.dropout=1.0"], "a number from 0 to 0.95"),
        (["adapter.targets=[]"], "at least one"),
        (["model.quantize=int4"], "packed weights cannot be trained"),
        (["model.quantize=int5", "adapter.rank=2"], "or 'int8' or 'experts-int4' or 'int4'"),
        (["data.answers=first"], "'all' or 'last'"),
        (["data.tokenizer=x"], "unknown key in"),
        (["adaptor.rank=2"], "did you mean 'adapter'"),
        (["adapter.dropout=0.1", "training.segment_tokens=64"], "drop inputs the second time"),
        (["training.recompute_layers=true", "training.segment_tokens=64"], "run again already"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        load(tmp_path, LEAST, changes)


def test_a_learning_rate_must_be_said(tmp_path):
    with pytest.raises(RecipeError, match="needs learning_rate"):
        load(tmp_path, LEAST.replace("learning_rate", "eps"))


@pytest.mark.parametrize("name", ["headlines_lora.toml", "headlines_full.toml"])
def test_the_recipes_that_come_along_are_sound(name):
    recipe = load_tuning_recipe(RECIPES / name)
    assert (recipe.adapter is None) == ("full" in name)
