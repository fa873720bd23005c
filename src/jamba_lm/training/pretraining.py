"""A run from fresh weights: the model of its recipe, and the folder that it leaves.

Knows nothing of steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from jamba_lm.model.decoder import Decoder
from jamba_lm.training.export import export_weights
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.run_text import RunText
from jamba_lm.training.task import Start


def fresh_start(recipe: Recipe, cache: Path) -> Start:
    """Read the data of `recipe`, and name its model.

    Raises:
        RecipeError: the tokenizer has more tokens than the model.
        DataError: text is missing or unusable.
    """
    text = RunText(recipe, cache)
    with torch.device("meta"):
        decoder = Decoder(recipe.model)
    return Start(decoder, text)


class Pretraining:
    """Training from fresh weights. See `task.Task`."""

    output = "model"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def start(self, cache: Path) -> Start:
        """Read the data and name the model."""
        return fresh_start(self._recipe, cache)

    def export(self, optimizer: MasterAdamW, folder: Path) -> None:
        """Write the model in the recipe's type as a Hugging Face folder, with its tokenizer."""
        export_weights(self._recipe, optimizer.masters(), folder)
