"""A training run as data: what a recipe file may say, and in which range.

Reads TOML strictly, and imports no torch. Knows nothing of how a run is carried out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jamba_lm.config import JambaConfig
from jamba_lm.errors import ConfigError, RecipeError
from jamba_lm.presets import preset

MAXIMUM_RECIPE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is read. Paths are relative to the recipe file.

    Attributes:
        train: files of documents, .jsonl with a `text` a line or plain text.
        validation: files of held-out documents.
        tokenizer: folder with tokenizer.json; copied beside the exported model.
        sequence_tokens: tokens of the longest piece of a document that is learned from.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    tokenizer: str
    sequence_tokens: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """How long, and in what.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_tokens: tokens of one forward and backward pass, at most.
        accumulate: passes whose gradients are summed for one step.
        workers: passes that run at the same time, each on a copy of the model and its share of the
            CPU threads. Sums are taken in the same order however many there are, so this changes
            the speed and nothing else; a small model is faster with workers of one thread each.
        dtype: what the model computes in; the master weights are float32 in any case.
        seed: of the initial weights and of the order of the data.
    """

    steps: int
    batch_tokens: int = 8192
    accumulate: int = 1
    workers: int = 1
    dtype: str = "bf16"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """AdamW's numbers; `clip_norm` bounds the norm of the whole gradient."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSection:
    """How the learning rate moves; see `optimizer.learning_rate_at`.

    Attributes:
        kind: "cosine" or "warmup-stable-decay".
        warmup_steps: steps until the peak.
        decay_steps: length of the final fall of "warmup-stable-decay"; unused by "cosine".
        final_fraction: part of the peak that is left at the end.
    """

    kind: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_fraction: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSection:
    """How often the held-out documents are read; they are always read after the last step."""

    every_steps: int = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """How often a run is saved: by steps, by the clock, or both. Neither changes the result.

    Attributes:
        every_steps: 0 means that steps do not matter.
        every_seconds: 0 means that the clock does not matter.
        keep: how many of the newest checkpoints stay.
    """

    every_steps: int = 0
    every_seconds: float = 300.0
    keep: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a run needs to know."""

    model: JambaConfig
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain sections, as a recipe file has them, with nothing left to a default."""
        sections: dict[str, dict[str, Any]] = {"model": self.model.to_dict()}
        for name in SECTIONS:
            sections[name] = dataclasses.asdict(getattr(self, name))
        return sections


SECTIONS: Mapping[str, type[Any]] = {
    "data": DataSection,
    "training": TrainingSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "validation": ValidationSection,
    "checkpoint": CheckpointSection,
}

# The range of every number, ends included.
_RANGES: Mapping[str, tuple[float, float]] = {
    "data.sequence_tokens": (2, 2**24),
    "training.steps": (1, 10**9),
    "training.batch_tokens": (2, 2**28),
    "training.accumulate": (1, 2**16),
    "training.workers": (1, 1024),
    "training.seed": (0, 2**62),
    "optimizer.learning_rate": (0.0, 100.0),
    "optimizer.beta1": (0.0, 0.999999),
    "optimizer.beta2": (0.0, 0.99999999),
    "optimizer.eps": (1e-30, 1.0),
    "optimizer.weight_decay": (0.0, 100.0),
    "optimizer.clip_norm": (1e-9, 1e9),
    "schedule.warmup_steps": (0, 10**9),
    "schedule.decay_steps": (0, 10**9),
    "schedule.final_fraction": (0.0, 1.0),
    "validation.every_steps": (1, 10**9),
    "checkpoint.every_steps": (0, 10**9),
    "checkpoint.every_seconds": (0.0, 10**9),
    "checkpoint.keep": (1, 10**6),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "training.dtype": ("bf16", "fp32"),
    "schedule.kind": ("cosine", "warmup-stable-decay"),
}


def load_recipe(path: Path, assignments: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, change it as `--set section.key=value` says, and check everything.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown (the message names the
            closest known one), or a value is missing, of the wrong kind or out of range.
    """
    sections = _read_toml(path)
    for assignment in assignments:
        _assign(sections, assignment)
    return build_recipe(sections, path.parent)


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"no recipe at {str(path)!r}: expected a TOML file")
    try:
        with path.open("rb") as file:
            data = file.read(MAXIMUM_RECIPE_BYTES + 1)
        if len(data) > MAXIMUM_RECIPE_BYTES:
            raise RecipeError(
                f"recipe {str(path)!r} is longer than {MAXIMUM_RECIPE_BYTES:,} bytes: "
                "is it the right file?"
            )
        return tomllib.loads(data.decode("utf-8"))
    except OSError as cause:
        raise RecipeError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError, ValueError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else _one_line(cause)
        raise RecipeError(f"recipe {str(path)!r} is not TOML: {reason}") from cause


def _one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split())[:200]


def _assign(sections: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(
            f"--set {assignment!r}: expected section.key=value, like training.steps=1000"
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        # A word that needs no quotes on a command line: its key must then take text.
        value = text.strip()
    table = sections.setdefault(section, {})
    if not isinstance(table, dict):
        raise RecipeError(f"[{section}] must be a table, but the recipe says {shown(table)}")
    table[key] = value


def build_recipe(sections: Mapping[str, Any], folder: Path) -> Recipe:
    """Check plain sections and make paths absolute, relative ones being relative to `folder`.

    Raises:
        RecipeError: as in `load_recipe`.
    """
    _check_keys(sections, ["model", *SECTIONS], "section")
    for name, value in sections.items():
        if not isinstance(value, Mapping):
            raise RecipeError(f"[{name}] must be a table, but the recipe says {shown(value)}")
    built = {
        name: _build_section(name, kind, sections.get(name, {})) for name, kind in SECTIONS.items()
    }
    built["data"] = dataclasses.replace(
        built["data"],
        train=tuple(_absolute(folder, path) for path in built["data"].train),
        validation=tuple(_absolute(folder, path) for path in built["data"].validation),
        tokenizer=_absolute(folder, built["data"].tokenizer),
    )
    recipe = Recipe(model=_build_model(sections.get("model", {})), **built)
    _check_together(recipe)
    return recipe


def _absolute(folder: Path, path: str) -> str:
    return str((folder / path).resolve())


def _build_model(values: Mapping[str, Any]) -> JambaConfig:
    changes = dict(values)
    name = changes.pop("preset", None)
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"model.preset is {shown(name)}: expected the name of a preset")
    try:
        base = JambaConfig() if name is None else preset(name)
        return base.replace(**changes)
    except (ConfigError, TypeError) as cause:
        raise RecipeError(f"[model]: {_one_line(cause)}") from cause


def _build_section(name: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    fields = {one.name: one for one in dataclasses.fields(kind)}
    _check_keys(values, list(fields), f"key in [{name}]")
    for key, one in fields.items():
        if one.default is dataclasses.MISSING and key not in values:
            raise RecipeError(f"[{name}] needs {key}: {_expected(f'{name}.{key}', str(one.type))}")
    checked = {
        key: _check_value(f"{name}.{key}", str(fields[key].type), value)
        for key, value in values.items()
    }
    return kind(**checked)


def _check_keys(given: Iterable[object], known: list[str], what: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise RecipeError(f"unknown {what}: {shown(key)}{hint}")


def _check_value(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple"):
        good = isinstance(value, (list, tuple)) and all(_is_text(one) for one in value)
        if good and value:
            return tuple(value)
    elif kind == "str":
        if _is_text(value) and value in _CHOICES.get(name, (value,)):
            return value
    elif not isinstance(value, bool) and isinstance(value, int if kind == "int" else (int, float)):
        low, high = _RANGES[name]
        if math.isfinite(value) and low <= value <= high:
            return value if kind == "int" else float(value)
    raise RecipeError(f"{name} is {shown(value)}: expected {_expected(name, kind)}")


def _is_text(value: object) -> bool:
    # No path and no choice holds a null character, and the system refuses one with a ValueError.
    return isinstance(value, str) and bool(value) and "\0" not in value


def _expected(name: str, kind: str) -> str:
    if kind.startswith("tuple"):
        return "a list of paths, at least one"
    if kind == "str":
        return " or ".join(map(repr, _CHOICES[name])) if name in _CHOICES else "a path"
    low, high = _RANGES[name]
    return f"{'a whole number' if kind == 'int' else 'a number'} from {low:g} to {high:g}"


def shown(value: object) -> str:
    """Return `value` as a message shows it: not all of it, when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_together(recipe: Recipe) -> None:
    training, schedule = recipe.training, recipe.schedule
    if training.workers > training.accumulate:
        raise RecipeError(
            f"training.workers is {training.workers} and training.accumulate "
            f"{training.accumulate}: each worker needs a pass of its own, so raise accumulate"
        )
    if recipe.data.sequence_tokens > training.batch_tokens:
        raise RecipeError(
            f"data.sequence_tokens is {recipe.data.sequence_tokens:,} and training.batch_tokens "
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
