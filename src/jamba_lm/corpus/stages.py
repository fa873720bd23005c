"""The stages of a recipe, made ready: what a document passes, one after the other.

Knows the names of a recipe; each stage is in a file of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from jamba_lm.corpus.code_filter import CodeStage
from jamba_lm.corpus.decontamination import DecontaminationStage
from jamba_lm.corpus.document import Drop
from jamba_lm.corpus.pii import PiiStage
from jamba_lm.corpus.recipe import CorpusRecipe


class Stage(Protocol):
    """What becomes of one text."""

    counts: Counter[str]

    def apply(self, text: str) -> str | Drop:
        """Return the text, perhaps changed, or why it is dropped."""


def make_stage(name: str, recipe: CorpusRecipe) -> Stage:
    """Make the stage of that name as the recipe wants it.

    Raises:
        BackendUnavailable: a package that the stage needs is missing.
        RecipeError: an option is not one of the stage's.
        DataError: a file that the stage needs is unusable.
    """
    match name:
        case "fix_text":
            from jamba_lm.corpus.text_repair import FixTextStage

            return FixTextStage(recipe.fix_text)
        case "language":
            from jamba_lm.corpus.language import LanguageStage

            assert recipe.language is not None
            return LanguageStage(recipe.language)
        case "code":
            return CodeStage(recipe.code)
        case "pii":
            return PiiStage(recipe.pii.kinds)
        case "decontaminate":
            assert recipe.decontaminate is not None
            return DecontaminationStage(recipe.decontaminate)
        case _:
            from jamba_lm.corpus.datatrove_filters import DatatroveStage

            return DatatroveStage(name, getattr(recipe, name).options)


def make_stages(recipe: CorpusRecipe) -> dict[str, Stage]:
    """Make every stage that some source passes, by name.

    Raises:
        JambaError: as in `make_stage`.
    """
    return {name: make_stage(name, recipe) for name in sorted(recipe.used_stages())}
