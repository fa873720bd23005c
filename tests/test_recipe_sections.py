"""What all recipe files have in common is read and changed strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_lm.errors import RecipeError
from jamba_lm.recipe_sections import MAXIMUM_RECIPE_BYTES, assign, read_sections


def test_a_recipe_is_read_as_plain_sections(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("[a]\nsteps = 3\n[[part]]\nname = 'x'\n")
    assert read_sections(path) == {"a": {"steps": 3}, "part": [{"name": "x"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[a", "is not TOML: "),
        (b"\xff = 1", "is not TOML: "),
        (b"a = " + b"[" * 100_000, "is not TOML: nested too deeply"),
        (b"#" * (MAXIMUM_RECIPE_BYTES + 1), "is longer than 1,048,576 bytes"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as refused:
        read_sections(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_missing_recipe_is_named_with_what_would_do(tmp_path: Path, make):
    path = tmp_path / "recipe.toml"
    make(path)
    with pytest.raises(RecipeError, match=r"no recipe at .*: expected something else"):
        read_sections(path, "something else")


def test_values_beside_the_file_replace_its_own():
    sections = {"a": {"steps": 3}}
    for assignment in ("a.steps = 4", "a.name=plain words", "b.flag=true"):
        assign(sections, assignment, "a.steps=1")
    assert sections == {"a": {"steps": 4, "name": "plain words"}, "b": {"flag": True}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.steps", "expected section.key=value, like a.steps=1"),
        ("steps=3", "expected section.key=value, like a.steps=1"),
        ("part.name=x", r"\[\[part\]\] is a list"),
        ("plain.name=x", r"\[plain\] must be a table"),
    ],
)
def test_what_is_no_assignment_changes_nothing(assignment: str, message: str):
    sections = {"part": [{"name": "x"}], "plain": 3}
    with pytest.raises(RecipeError, match=message):
        assign(sections, assignment, "a.steps=1")
    assert sections == {"part": [{"name": "x"}], "plain": 3}
