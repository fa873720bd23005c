"""A recipe is read strictly: every mistake is one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.corpus.plan import Plan, read_plan, write_plan
from jamba_lm.corpus.recipe import CorpusRecipe, result_digest
from jamba_lm.corpus.recipe_file import build_corpus_recipe, load_corpus_recipe
from jamba_lm.errors import JambaError, RecipeError

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {"name": "a", "files": ["*.txt"]}
DATATROVE = {"name": "a", "format": "datatrove", "reader": "WarcReader"}


def with_source(**changes: object) -> dict[str, object]:
    return {"source": [SOURCE | changes]}


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({}, r"no \[\[source\]\]"),
        ({"source": {"name": "a"}}, r"no \[\[source\]\]"),
        ({"source": [3]}, "number 1 is 3"),
        ({"source": [{"files": ["*"]}]}, r"\[source\] needs name"),
        (with_source(name="A b"), "small letters"),
        (with_source(name=""), "source.name"),
        (with_source(fields="text"), "did you mean 'field'"),
        (with_source(files=[]), "needs files"),
        (with_source(files="*.txt"), "a list of texts"),
        (with_source(format="csv"), "'auto' or 'text'"),
        (with_source(weight=-1), "from 0"),
        (with_source(weight=float("nan")), "from 0"),
        (with_source(weight=True), "from 0"),
        (with_source(weight=0), "weight 0"),
        (with_source(stages=["gofer_quality"]), "did you mean 'gopher_quality'"),
        (with_source(stages=["pii", "pii"]), "twice"),
        (with_source(stages=["language"]), r"no \[language\] section"),
        (with_source(stages=["decontaminate"]), r"no \[decontaminate\] section"),
        (with_source(reader="WarcReader"), "format is not 'datatrove'"),
        (with_source(format="jsonl", separator="%"), "plain text"),
        (with_source(format="text", field="body"), "no fields"),
        (with_source(encoding="utf-7"), "'latin-1'"),
        ({"source": [DATATROVE | {"files": ["*"]}]}, "no files"),
        ({"source": [{"name": "a", "format": "datatrove"}]}, "name of a reader"),
        ({"source": [SOURCE, SOURCE]}, "two sources"),
        ({"source": [SOURCE], "sourse": 1}, "did you mean 'source'"),
        ({"source": [SOURCE], "split": 3}, "must be a table"),
        ({"source": [SOURCE], "split": {"validation": 0.6}}, "from 0 to 0.5"),
        ({"source": [SOURCE], "pii": {}}, "no source passes it"),
        ({"source": [SOURCE], "c4": {"min_num_sentences": 3}}, "no source passes it"),
        ({"source": [SOURCE], "duplicates": {"near": False, "bands": 3}}, "leave one out"),
        ({"source": [SOURCE], "duplicates": {"exact": "yes"}}, "true or false"),
        ({"source": [SOURCE], "execution": {"options": {"time": "1"}}}, "'local'"),
        ({"source": [SOURCE], "execution": {"workers": 0}}, "from 1"),
        ({"source": [SOURCE], "execution": {"workers": 1.5}}, "a whole number"),
        ({"source": [SOURCE], "tokens": {"tokenizer": "a\0b"}}, "a text"),
        (
            with_source(stages=["decontaminate"])
            | {"decontaminate": {"files": ["e"], "ngram": 5, "minimum_words": 8}},
            "lower minimum_words",
        ),
        (with_source(stages=["pii"]) | {"pii": {"kinds": ["name"]}}, "unknown entry"),
    ],
)
def test_a_mistake_is_said_in_one_line(sections, word):
    with pytest.raises(RecipeError, match=word) as caught:
        build_corpus_recipe(sections, Path("/data"))
    assert "\n" not in str(caught.value)


def test_paths_are_relative_to_the_recipe(tmp_path):
    folder = tmp_path / "a[b]"
    folder.mkdir()
    (folder / "r.toml").write_text(
        '[[source]]\nname = "a"\nfiles = ["x/*.txt", "/data/*.txt"]\n[tokens]\ntokenizer = "tok"\n'
    )
    recipe = load_corpus_recipe(folder / "r.toml")
    # A bracket in a folder's name is no pattern.
    assert recipe.source[0].files == (f"{tmp_path}/a[[]b]/x/*.txt", "/data/*.txt")
    assert recipe.tokens.tokenizer == f"{folder}/tok"


def test_a_folder_is_a_recipe(tmp_path):
    recipe = load_corpus_recipe(tmp_path, ["execution.workers=2"])
    assert [source.files for source in recipe.source] == [(f"{tmp_path}/**/*",)]
    assert recipe.execution.workers == 2


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("workers=2", "section.key=value"),
        ("execution.workers", "section.key=value"),
        ("source.name=b", "in the recipe file"),
        ("execution.workres=2", "did you mean 'workers'"),
    ],
)
def test_a_set_that_cannot_be_is_refused(tmp_path, assignment, word):
    with pytest.raises(RecipeError, match=word):
        load_corpus_recipe(tmp_path, [assignment])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\xff", "not TOML"),
        (b"a = ", "not TOML"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"#" * (2**20 + 1), "longer than"),
    ],
    ids=["not UTF-8", "no value", "deep", "long"],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, data, word):
    path = tmp_path / "r.toml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=word):
        load_corpus_recipe(path)
    with pytest.raises(RecipeError, match="no recipe at"):
        load_corpus_recipe(tmp_path / "missing.toml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["name", "files", "weight", "stages", "format", "field", "reader", "separator"]
)
sections = st.sampled_from(["split", "pii", "duplicates", "tokens", "execution", "c4", "language"])


@settings(max_examples=50)
@given(
    st.dictionaries(keys, json_values, max_size=4),
    st.dictionaries(sections, json_values | st.dictionaries(st.text(max_size=8), json_values)),
)
def test_no_value_is_a_crash(source, others):
    try:
        recipe = build_corpus_recipe({"source": [SOURCE | source], **others}, Path("/data"))
    except RecipeError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(recipe, CorpusRecipe)


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    recipe = build_corpus_recipe(
        {
            "source": [
                SOURCE | {"stages": ["pii", "c4", "fix_text", "decontaminate"], "weight": 0.5},
                DATATROVE | {"name": "b", "reader_options": {"data_folder": "x"}},
            ],
            "c4": {"min_num_sentences": 2},
            "decontaminate": {"files": ["e.jsonl"], "fields": ["question", "text"]},
            "execution": {"executor": "slurm", "options": {"partition": "cpu", "time": "1:00"}},
        },
        Path("/data"),
    )
    write_plan(tmp_path, Plan(recipe, (), (), ()))
    assert read_plan(tmp_path).recipe == recipe
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    for damage in (
        {"format": "other"},
        {"units": [1]},
        {"recipe": {"source": []}},
        {"tasks": None},
    ):
        path.write_text(json.dumps(plan | damage))
        with pytest.raises(JambaError):
            read_plan(tmp_path)


def test_who_does_the_work_does_not_name_the_result():
    one, other, third = (
        result_digest(build_corpus_recipe(sections, Path("/data")).to_dict())
        for sections in (
            {"source": [SOURCE]},
            {"source": [SOURCE], "execution": {"workers": 8, "tasks": 3}},
            {"source": [SOURCE], "split": {"validation": 0.02}},
        )
    )
    assert one == other != third


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "corpora").glob("*.toml")), ids=lambda path: path.name
)
def test_the_recipes_of_the_repository_are_recipes(path):
    assert len(load_corpus_recipe(path).source) > 1
