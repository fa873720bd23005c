"""The recipes inside the package say what they claim, and are refused where they cannot run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jamba_lm.analysis.memory import parameter_counts
from jamba_lm.cli.main import main
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError, RecipeError
from jamba_lm.model.layout import plan_layers
from jamba_lm.training import loop
from jamba_lm.training.capacity import check_memory
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.recipe_file import RECIPE_FOLDER, RECIPES, load_recipe

GIB = 2**30
TEXT = "data.prepared=prepared"


def preset(name: str, *changes: str) -> Recipe:
    return load_recipe(Path(name), [TEXT, *changes])


def attention_layers(config: JambaConfig) -> list[int]:
    return [n for n, layer in enumerate(plan_layers(config)) if layer.mixer == "attention"]


def expert_layers(config: JambaConfig) -> list[int]:
    return [n for n, layer in enumerate(plan_layers(config)) if layer.feed_forward == "moe"]


def arms(name: str) -> list[list[str]]:
    """Return the changes that the comments of a recipe offer, line by line."""
    lines = (RECIPE_FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    found = [re.findall(r"--set (\S+)", line) for line in lines if line.startswith("#   ")]
    return [changes for changes in found if changes and TEXT not in changes]


def test_every_recipe_of_the_folder_has_its_name_and_is_sound():
    assert {path.stem for path in RECIPE_FOLDER.iterdir()} == set(RECIPES)
    for name in RECIPES:
        assert preset(name).training.steps > 0


def test_the_command_names_them_all(capsys):
    assert main(["train", "run", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in RECIPES:
        assert re.search(rf"[ :]{re.escape(name)}[ ,.]", said), name
    assert main(["train", "tinny", "--out", "run"]) == 2
    assert f"or one of {', '.join(RECIPES)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("tiny", 0.0024, 0.02),
        ("demo", 0.00786, 0.01),
        ("100m", 0.104, 0.01),
        ("ablation-1.3b", 1.3, 0.01),
        ("ablation-7b", 7.0, 0.02),
        ("jamba-v0.1", 51.57, 0.001),
    ],
)
def test_models_have_the_sizes_they_are_called_by(name, billions, tolerance):
    counts = parameter_counts(preset(name).model)
    assert counts.total / 1e9 == pytest.approx(billions, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "billions"), [("ablation-1.3b", 250), ("ablation-7b", 50), ("jamba-v0.1", 1000)]
)
def test_they_see_as_many_tokens_as_they_say(name, billions):
    training = preset(name).training
    tokens = training.steps * training.batch_tokens * training.accumulate
    assert tokens / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_ablations_have_attention_where_the_paper_shows_it():
    assert attention_layers(preset("ablation-1.3b").model) == [4, 12, 20]
    assert attention_layers(preset("ablation-7b").model) == [4, 12, 20, 28]


@pytest.mark.parametrize("name", ["ablation-1.3b", "ablation-7b"])
def test_the_arms_that_a_recipe_offers_are_those_of_the_paper(name):
    plain = preset(name).model
    found = {tuple(changes): preset(name, *changes).model for changes in arms(name)}
    attention = {changes: len(attention_layers(one)) for changes, one in found.items()}
    layers = plain.num_layers
    assert {0, layers} <= set(attention.values()), "no arm of Mamba or of attention alone"
    if name == "ablation-1.3b":
        assert layers // 4 in attention.values(), "no arm of 1:3"
        assert any(one.position == "rope" for one in found.values())
    (mixture,) = [one for one in found.values() if one.num_experts > 1]
    assert (mixture.num_experts, mixture.experts_per_token) == (16, 2)
    assert expert_layers(mixture) == list(range(1, layers, 2))


def test_without_text_it_says_how_to_name_some():
    with pytest.raises(RecipeError, match=r"--set data\.prepared=DIR"):
        load_recipe(Path("tiny"))


def test_paths_beside_a_name_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A file of that name is a path: ./tiny
    (tmp_path / "tiny").write_text("no TOML at all")
    assert preset("tiny").data.prepared == str(tmp_path / "prepared")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(Path("tiny").resolve())


@pytest.mark.parametrize("name", RECIPES)
def test_what_cannot_fit_is_refused_before_it_begins(name):
    """14 bytes a parameter, and 4 more where gradients of several passes are summed."""
    recipe = preset(name)
    parameters = parameter_counts(recipe.model).total
    copies = 1 + (recipe.training.workers - 1) / 4
    with pytest.raises(CapacityError, match=r"take [\d,.]+ GiB in each of 1 processes"):
        check_memory(recipe, 14 * parameters)
    check_memory(recipe, int(copies * 20.1 * parameters))


def test_processes_that_share_a_model_need_less_each():
    whole, shared = preset("ablation-1.3b"), preset("ablation-1.3b", "parallel.shard=16")
    with pytest.raises(CapacityError):
        check_memory(whole, 4 * GIB)
    check_memory(shared, 4 * GIB)


def test_a_run_asks_first(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "usable_memory", lambda: 2**20)
    with pytest.raises(CapacityError, match="take a smaller one"):
        loop.train(preset("tiny"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
