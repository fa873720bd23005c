"""Recipes are read strictly: what is wrong is named on one line, what is right comes back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.errors import RecipeError
from jamba_lm.finetuning.recipe_file import load_tuning_recipe
from jamba_lm.training.recipe_file import build_recipe, load_recipe
from jamba_lm.training.recipe_record import check_continuation, to_toml

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
[model]
preset = "demo"
d_ff = 64

[data]
train = ["a.jsonl", "b.jsonl"]
validation = ["c.jsonl"]
tokenizer = "tokenizer"

[training]
steps = 100

[schedule]
warmup_steps = 10
"""


def load(folder: Path, text: str = TEXT, changes: list[str] | None = None):
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, changes or [])


def test_every_recipe_of_the_project_is_sound():
    """Those that train, from fresh weights or from a model; the others prepare text."""
    found = {
        path: tomllib.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "recipes").glob("*.toml"))
    }
    recipes = {path: sections for path, sections in found.items() if "training" in sections}
    names = {path.name for path in recipes}
    assert names >= {"demo.toml", "demo50m.toml", "headlines_full.toml", "headlines_lora.toml"}
    for path, sections in recipes.items():
        (load_tuning_recipe if "base" in sections["model"] else load_recipe)(path)


def test_paths_are_relative_to_the_recipe(tmp_path):
    recipe = load(tmp_path)
    assert recipe.data.train == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert recipe.data.tokenizer == str(tmp_path / "tokenizer")
    assert recipe.model.d_ff == 64
    assert recipe.model.num_experts == 8


def test_written_out_in_full_it_reads_the_same(tmp_path):
    recipe = load(tmp_path, changes=["optimizer.learning_rate=1e-4", "model.eos_ids=[2, 5]"])
    (tmp_path / "elsewhere").mkdir()
    again = load(tmp_path / "elsewhere", to_toml(recipe))
    assert again == recipe


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@settings(max_examples=300)
def test_any_path_survives_being_written_out(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("recipe")
    sections = {
        "model": {"preset": "demo"},
        "data": {"train": ["/" + name], "validation": ["v"], "tokenizer": "t"},
        "training": {"steps": 1000},
    }
    recipe = build_recipe(sections, folder)
    assert load(folder, to_toml(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.step=5", "unknown key in [training]: 'step'; did you mean 'steps'?"),
        ("trainings.steps=5", "unknown section: 'trainings'; did you mean 'training'?"),
        ("model.num_expert=4", "did you mean 'num_experts'?"),
        ("model.preset=dem", "demo"),
        ("model.preset=3", "model.preset is 3"),
        ("training.steps=0", "training.steps is 0: expected a whole number from 1"),
        ("training.steps=1.5", "training.steps is 1.5: expected a whole number"),
        ("training.steps=true", "training.steps is True"),
        ("training.dtype=fp16", "training.dtype is 'fp16': expected 'bf16' or 'fp32'"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1"),
        ("data.train=[]", "data.train is []: expected a list of paths"),
        ("data.train=a.jsonl", "data.train is 'a.jsonl': expected a list of paths"),
        ('data.tokenizer="a\\u0000"', "data.tokenizer is 'a\\x00': expected a path"),
        ("data.sequence_tokens=9000", "a batch must hold at least one whole sequence"),
        ("schedule.warmup_steps=101", "more than the 100 training.steps"),
        ("schedule.decay_steps=5", "a cosine has none"),
        ("checkpoint.every_seconds=0", "both 0"),
        ("training.workers=2", "raise accumulate"),
        ("training.segment_tokens=-1", "training.segment_tokens is -1: expected a whole number"),
        ("training.across_segments=cut", "expected 'whole' or 'truncated'"),
        ("training.across_segments=truncated", "give training.segment_tokens, or leave it out"),
        ("steps=5", "expected section.key=value"),
        ("training.steps", "expected section.key=value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, changes=[change])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "beside",
    [
        ["training.recompute_layers=true"],
        ["loss.activation_coef=1e-5"],
        ["loss.balance_over=step", "training.accumulate=2"],
    ],
)
def test_segments_refuse_what_is_not_computed_with_them(tmp_path, beside):
    load(tmp_path, changes=beside)
    with pytest.raises(RecipeError, match="leave one of them out"):
        load(tmp_path, changes=[*beside, "training.segment_tokens=64"])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"\[data\] needs train"):
        load(tmp_path, "[training]\nsteps = 5\n")


@pytest.mark.parametrize("content", [b"\xff", b"= 1", b"a = 1\na = 2", b"x = " + b"[" * 5000])
def test_what_is_not_toml_is_one_error(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="is not TOML") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_missing_and_huge_recipes_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="longer than"):
        load_recipe(tmp_path / "huge.toml")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["demo", "bf16", "cosine", 2, 1e-3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
names = st.text(max_size=8) | st.sampled_from(
    [
        *("preset", "d_ff", "num_layers", "train", "validation", "tokenizer", "sequence_tokens"),
        *("steps", "batch_tokens", "dtype", "accumulate", "workers", "learning_rate", "kind"),
        *("warmup_steps", "decay_steps", "every_steps", "keep"),
    ]
)
section_names = st.sampled_from(
    ["model", "data", "training", "optimizer", "schedule", "validation", "checkpoint"]
)
sections = st.dictionaries(
    section_names | st.text(max_size=8),
    st.dictionaries(names, values, max_size=4) | values,
    max_size=7,
)


@given(sections)
@settings(max_examples=1000)
def test_any_values_are_a_recipe_or_one_line(sections):
    try:
        build_recipe(sections, Path("/nowhere"))
    except RecipeError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000


@given(st.binary(max_size=60), st.integers(0, len(TEXT)))
@settings(max_examples=500)
def test_a_damaged_recipe_is_a_recipe_or_one_line(tmp_path_factory, noise, place):
    path = tmp_path_factory.mktemp("fuzz") / "recipe.toml"
    data = TEXT.encode()
    path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    try:
        load_recipe(path)
    except RecipeError as error:
        assert "\n" not in str(error)


@given(st.text(max_size=40))
@settings(max_examples=500)
def test_any_set_is_taken_or_refused_on_one_line(tmp_path_factory, assignment):
    folder = tmp_path_factory.mktemp("set")
    for text in (assignment, f"training.steps={assignment}", f"data.tokenizer={assignment}"):
        try:
            load(folder, changes=[text])
        except RecipeError as error:
            assert "\n" not in str(error)


def test_a_run_may_be_made_longer_but_not_another(tmp_path):
    before = load(tmp_path).to_dict()
    longer = load(tmp_path, changes=["training.steps=500", "checkpoint.keep=5"]).to_dict()
    assert check_continuation(before, longer) == ["checkpoint.keep", "training.steps"]
    other = load(tmp_path, changes=["model.d_ff=128"]).to_dict()
    with pytest.raises(RecipeError, match=r"model\.d_ff is 128, but the run to resume has 64"):
        check_continuation(before, other)
