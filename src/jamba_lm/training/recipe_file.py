"""A recipe file, read strictly: unknown keys, wrong kinds and numbers out of range are refused.

Imports no torch. Knows what a recipe may say, and nothing of how a run is carried out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jamba_lm.config import JambaConfig
from jamba_lm.errors import ConfigError, RecipeError
from jamba_lm.presets import preset
from jamba_lm.recipe_sections import assign, read_sections
from jamba_lm.training.recipe import (
    CHOICES,
    RANGES,
    SECTIONS,
    DataSection,
    Recipe,
    RunRecipe,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the values of a kind of recipe may be, by `section.key`.

    Attributes:
        ranges: of every number, ends included.
        choices: of texts that are no free ones.
        texts: what a text or a list is, where it is not a path.
    """

    ranges: Mapping[str, tuple[float, float]]
    choices: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


TRAINING_RULES = Rules(RANGES, CHOICES)

# Recipes inside the package, from minutes to months, which say all but the text. What a file has in
# its comments is what of it is the paper's and what is ours.
RECIPES = ("tiny", "demo", "100m", "ablation-1.3b", "ablation-7b", "jamba-v0.1")
RECIPE_FOLDER = Path(__file__).parent / "recipes"


def load_recipe(path: Path, assignments: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, change it as `--set section.key=value` says, and check everything.

    Args:
        path: of a file, which relative paths in it start from, or the name of one of `RECIPES`,
            where they start from the working directory.
        assignments: what `--set` was given.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown (the message names the
            closest known one), or a value is missing, of the wrong kind or out of range.
    """
    source, folder = path, path.parent
    if str(path) in RECIPES:
        source, folder = RECIPE_FOLDER / f"{path}.toml", Path()
    sections = read_sections(source, f"a TOML file, or one of {', '.join(RECIPES)}")
    for assignment in assignments:
        assign(sections, assignment, "training.steps=1000")
    return build_recipe(sections, folder)


def build_recipe(sections: Mapping[str, Any], folder: Path) -> Recipe:
    """Check plain sections and make paths absolute, relative ones being relative to `folder`.

    Raises:
        RecipeError: as in `load_recipe`.
    """
    check_keys(sections, ["model", *SECTIONS], "section")
    check_tables(sections)
    built = {
        name: build_section(name, kind, sections.get(name, {}), TRAINING_RULES)
        for name, kind in SECTIONS.items()
    }
    built["data"] = dataclasses.replace(
        built["data"],
        train=tuple(_absolute(folder, path) for path in built["data"].train),
        validation=tuple(_absolute(folder, path) for path in built["data"].validation),
        tokenizer=_absolute(folder, built["data"].tokenizer),
        prepared=_absolute(folder, built["data"].prepared),
    )
    recipe = Recipe(model=_build_model(sections.get("model", {})), **built)
    _check_together(recipe)
    return recipe


def _absolute(folder: Path, path: str) -> str:
    return str((folder / path).resolve()) if path else ""


def _build_model(values: Mapping[str, Any]) -> JambaConfig:
    changes = dict(values)
    name = changes.pop("preset", None)
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"model.preset is {shown(name)}: expected the name of a preset")
    try:
        base = JambaConfig() if name is None else preset(name)
        return base.replace(**changes)
    except (ConfigError, TypeError) as cause:
        raise RecipeError(f"[model]: {' '.join(str(cause).split())[:200]}") from cause


def check_tables(sections: Mapping[str, Any]) -> None:
    """Refuse a section that is no table."""
    for name, value in sections.items():
        if not isinstance(value, Mapping):
            raise RecipeError(f"[{name}] must be a table, but the recipe says {shown(value)}")


def build_section(name: str, kind: type[Any], values: Mapping[str, Any], rules: Rules) -> Any:
    """Make a section of its plain values.

    Raises:
        RecipeError: a key is unknown or missing, or a value of the wrong kind or out of range.
    """
    fields = {one.name: one for one in dataclasses.fields(kind)}
    check_keys(values, list(fields), f"key in [{name}]")
    for key, one in fields.items():
        if one.default is dataclasses.MISSING and key not in values:
            raise RecipeError(
                f"[{name}] needs {key}: {_expected(f'{name}.{key}', str(one.type), rules)}"
            )
    checked = {
        key: _check_value(f"{name}.{key}", str(fields[key].type), value, rules)
        for key, value in values.items()
    }
    return kind(**checked)


def check_keys(given: Iterable[object], known: list[str], what: str) -> None:
    """Refuse a name that is not known, naming the closest that is."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise RecipeError(f"unknown {what}: {shown(key)}{hint}")


def _check_value(name: str, kind: str, value: Any, rules: Rules) -> Any:
    if kind.startswith("tuple"):
        good = isinstance(value, (list, tuple)) and all(_is_text(one) for one in value)
        if good and value:
            return tuple(value)
    elif kind == "str":
        if _is_text(value) and value in rules.choices.get(name, (value,)):
            return value
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool) and isinstance(value, int if kind == "int" else (int, float)):
        low, high = rules.ranges[name]
        if math.isfinite(value) and low <= value <= high:
            return value if kind == "int" else float(value)
    raise RecipeError(f"{name} is {shown(value)}: expected {_expected(name, kind, rules)}")


def _is_text(value: object) -> bool:
    # No path and no choice holds a null character, and the system refuses one with a ValueError.
    return isinstance(value, str) and bool(value) and "\0" not in value


def _expected(name: str, kind: str, rules: Rules) -> str:
    if name in rules.texts:
        return rules.texts[name]
    if kind.startswith("tuple"):
        return "a list of paths, at least one"
    if kind == "str":
        return " or ".join(map(repr, rules.choices[name])) if name in rules.choices else "a path"
    if kind == "bool":
        return "true or false"
    low, high = rules.ranges[name]
    return f"{'a whole number' if kind == 'int' else 'a number'} from {low:g} to {high:g}"


def shown(value: object) -> str:
    """Return `value` as a message shows it: not all of it, when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_text(data: DataSection) -> None:
    given = [key for key in ("train", "validation", "tokenizer") if getattr(data, key)]
    twice = [key for key in given if key != "validation"]
    if data.prepared and twice:
        raise RecipeError(
            f"data.prepared and data.{twice[0]} are both given: a prepared folder holds its "
            "training text and its tokenizer, so leave one out"
        )
    if not data.prepared and len(given) < 3:
        missing = next(key for key in ("train", "validation", "tokenizer") if key not in given)
        expected = _expected(f"data.{missing}", _DATA_KINDS[missing], TRAINING_RULES)
        raise RecipeError(
            f"[data] needs {missing}: {expected}; or "
            "prepared: a folder that `jamba data prepare` has written, as with "
            "--set data.prepared=DIR"
        )


_DATA_KINDS = {"train": "tuple", "validation": "tuple", "tokenizer": "str"}


def _check_segments(recipe: RunRecipe) -> None:
    """Refuse what has no effect with passes in segments, or is not computed with them."""
    training, loss = recipe.training, recipe.loss
    if not training.segment_tokens:
        if training.across_segments != "whole":
            raise RecipeError(
                f"training.across_segments is {training.across_segments!r}, and there are no "
                "segments: give training.segment_tokens, or leave it out"
            )
        return
    refused = {
        "training.recompute_layers": (training.recompute_layers, "layers run again already"),
        "loss.activation_coef": (bool(loss.activation_coef), "it is a mean over whole passes"),
        "loss.balance_over": (
            loss.balance_over == "step" and training.accumulate > 1,
            "experts would be counted in passes without segments",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise RecipeError(
                f"training.segment_tokens is {training.segment_tokens:,} and {name} is given as "
                f"well: {why}, so leave one of them out"
            )


def _check_together(recipe: Recipe) -> None:
    _check_text(recipe.data)
    check_run(recipe, recipe.data.sequence_tokens)


def check_run(recipe: RunRecipe, sequence_tokens: int) -> None:
    """Check what any kind of run must keep to.

    Args:
        recipe: of any kind.
        sequence_tokens: of the longest piece that it reads.

    Raises:
        RecipeError: values that contradict one another.
    """
    training, schedule = recipe.training, recipe.schedule
    _check_segments(recipe)
    if training.workers > training.accumulate:
        raise RecipeError(
            f"training.workers is {training.workers} and training.accumulate "
            f"{training.accumulate}: each worker needs a pass of its own, so raise accumulate"
        )
    if sequence_tokens > training.batch_tokens:
        raise RecipeError(
            f"data.sequence_tokens is {sequence_tokens:,} and training.batch_tokens "
            f"{training.batch_tokens:,}: a batch must hold at least one whole sequence"
        )
    used = schedule.decay_steps if schedule.kind == "warmup-stable-decay" else 0
    if schedule.warmup_steps + used > training.steps:
        raise RecipeError(
            f"schedule.warmup_steps + decay_steps is {schedule.warmup_steps + used:,}, more than "
            f"the {training.steps:,} training.steps"
        )
    if schedule.kind == "cosine" and schedule.decay_steps:
        raise RecipeError(
            "schedule.decay_steps is given, but a cosine has none: leave it out, or set "
            'schedule.kind = "warmup-stable-decay"'
        )
    if not recipe.checkpoint.every_steps and not recipe.checkpoint.every_seconds:
        raise RecipeError(
            "checkpoint.every_steps and checkpoint.every_seconds are both 0: a run that is never "
            "saved cannot be resumed; give one of them"
        )
