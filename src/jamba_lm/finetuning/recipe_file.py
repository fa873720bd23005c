"""The recipe file of a fine-tuning run, read as strictly as that of a training run.

Imports no torch. Knows what a recipe may say, and nothing of how a run is carried out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jamba_lm.errors import RecipeError
from jamba_lm.finetuning.recipe import (
    TUNING_CHOICES,
    TUNING_RANGES,
    TUNING_SECTIONS,
    TuningRecipe,
)
from jamba_lm.recipe_sections import assign, read_sections
from jamba_lm.training.recipe_file import (
    Rules,
    build_section,
    check_keys,
    check_run,
    check_tables,
)

# The model inside the package, as commands call it, too.
EMBEDDED = "demo"

TUNING_RULES = Rules(
    TUNING_RANGES,
    TUNING_CHOICES,
    {
        "model.base": f"a checkpoint folder, a .gguf file, or {EMBEDDED!r}",
        "adapter.targets": 'a list like ["attention", "experts.down_proj"], at least one',
    },
)


def load_tuning_recipe(path: Path, assignments: Iterable[str] = ()) -> TuningRecipe:
    """Read a recipe file, change it as `--set section.key=value` says, and check everything.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown (the message names the
            closest known one), or a value is missing, of the wrong kind or out of range.
    """
    sections = read_sections(path)
    for assignment in assignments:
        assign(sections, assignment, "adapter.rank=16")
    return build_tuning_recipe(sections, path.parent)


def build_tuning_recipe(sections: Mapping[str, Any], folder: Path) -> TuningRecipe:
    """Check plain sections and make paths absolute, relative ones being relative to `folder`.

    Raises:
        RecipeError: as in `load_tuning_recipe`.
    """
    check_keys(sections, list(TUNING_SECTIONS), "section")
    check_tables(sections)
    built = {
        name: build_section(name, kind, sections.get(name, {}), TUNING_RULES)
        for name, kind in TUNING_SECTIONS.items()
        if name != "adapter" or name in sections
    }
    if "learning_rate" not in sections.get("optimizer", {}):
        raise RecipeError(
            "[optimizer] needs learning_rate: around 2e-4 for an adapter, 1e-5 for all weights of "
            "a large model, more for a small one"
        )
    base = built["model"].base
    built["model"] = dataclasses.replace(
        built["model"], base=base if base == EMBEDDED else str((folder / base).resolve())
    )
    built["data"] = dataclasses.replace(
        built["data"],
        train=tuple(str((folder / path).resolve()) for path in built["data"].train),
        validation=tuple(str((folder / path).resolve()) for path in built["data"].validation),
    )
    recipe = TuningRecipe(**built)
    _check_together(recipe)
    return recipe


def _check_together(recipe: TuningRecipe) -> None:
    check_run(recipe, recipe.data.sequence_tokens)
    adapter = recipe.adapter
    if recipe.model.quantize and adapter is None:
        raise RecipeError(
            f"model.quantize is {recipe.model.quantize!r}, and packed weights cannot be trained: "
            "add an [adapter] section, or leave model.quantize out"
        )
    if adapter is not None and adapter.dropout and recipe.loss.balance_over == "step":
        raise RecipeError(
            'adapter.dropout and loss.balance_over = "step" are both given: experts are counted '
            "in a pass of its own, which would drop other inputs; leave one of them out"
        )
    if adapter is not None and adapter.dropout and recipe.training.segment_tokens:
        raise RecipeError(
            "adapter.dropout and training.segment_tokens are both given: every segment runs "
            "forward twice, and would drop inputs the second time only; leave one of them out"
        )
