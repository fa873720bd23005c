"""A recipe written down beside its run, and compared with the run that it is to continue.

Knows sections of plain values, and not what they mean.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jamba_lm.errors import RecipeError
from jamba_lm.training.recipe import SECTIONS, RunRecipe
from jamba_lm.training.recipe_file import shown

# What may differ between a run and its continuation: how long it goes on, how it is watched, and
# what the model is said to be good for, with which nothing is computed.
CHANGEABLE = (
    "model.context_length",
    "training.steps",
    "training.workers",
    "schedule.",
    "optimizer.learning_rate",
    "watch.every_steps",
    "watch.tensorboard",
    "validation.",
    "checkpoint.",
    "parallel.",
)


def to_toml(recipe: RunRecipe) -> str:
    """Write a recipe out in full, so that reading it gives the same recipe."""
    lines = []
    for name, values in recipe.to_dict().items():
        lines.append(f"[{name}]")
        # What is empty was not given: a list of no paths is no value that a recipe may have.
        lines += [
            f"{key} = {_toml(value)}"
            for key, value in values.items()
            if value is not None and value not in ("", ())
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for the one control character that JSON lets through
        # and the surrogate pairs that it spells out.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def check_continuation(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    kinds: Mapping[str, type[Any]] = SECTIONS,
) -> list[str]:
    """Compare the sections of a run with those it is to be continued with.

    Args:
        before: as the run to resume has them.
        now: as the recipe has them.
        kinds: the sections' classes, by name.

    Returns:
        The names of what differs and may.

    Raises:
        RecipeError: something differs that would make it another run.
    """
    before = _with_defaults(before, kinds)
    now = _with_defaults(now, kinds)
    if _readers(before) != _readers(now):
        _check_passes(before, now)
    changed = []
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section, {}), now.get(section, {})
        for key in sorted(old.keys() | new.keys()):
            name = f"{section}.{key}"
            if _plain(old.get(key)) == _plain(new.get(key)):
                continue
            if name == "training.accumulate":
                _check_passes(before, now)
            elif not name.startswith(CHANGEABLE):
                raise RecipeError(
                    f"{name} is {shown(new.get(key))}, but the run to resume has "
                    f"{shown(old.get(key))}; change it back, or start in another --out folder"
                )
            changed.append(name)
    return changed


def _readers(sections: Mapping[str, Any]) -> int:
    layout = sections.get("parallel", {})
    return int(layout.get("replicate", 1) * layout.get("shard", 1))


def _check_passes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that a step is made of as many passes, however they are shared out.

    Raises:
        RecipeError: it is not.
    """
    old, new = (
        int(sections["training"]["accumulate"]) * _readers(sections) for sections in (before, now)
    )
    if old != new:
        raise RecipeError(
            f"a step would be {new} passes (training.accumulate = "
            f"{now['training']['accumulate']} in each of {_readers(now)} processes that read), but "
            f"the run to resume has {old}: change accumulate so that the product stays, or start "
            "in another --out folder"
        )


def _with_defaults(sections: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Fill in what a run of an earlier version did not say: it did what is now the default."""
    filled = {name: dict(values) for name, values in sections.items()}
    for name, kind in kinds.items():
        values = filled.setdefault(name, {})
        for one in dataclasses.fields(kind):
            if one.default is not dataclasses.MISSING:
                values.setdefault(one.name, one.default)
    return filled


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
