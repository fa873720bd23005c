"""A run from fresh weights: the model of its recipe, and the folder that it leaves.

Knows nothing of steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from jamba_lm.checkpoint.huggingface import DTYPES, write_decoder
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.run_text import RunText, tokenizer_folder
from jamba_lm.training.task import Start


def fresh_start(recipe: Recipe, cache: Path) -> Start:
    """Read the data of `recipe` and make its model.

    Raises:
        RecipeError: the tokenizer has more tokens than the model.
        DataError: text is missing or unusable.
    """
    text = RunText(recipe, cache)
    with torch.device("meta"):
        decoder = Decoder(recipe.model)
    initialize(decoder, recipe.training.seed)
    return Start(decoder, text)


class Pretraining:
    """Training from fresh weights. See `task.Task`."""

    output = "model"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def start(self, cache: Path) -> Start:
        """Read the data and make the model."""
        return fresh_start(self._recipe, cache)

    def export(self, optimizer: MasterAdamW, folder: Path) -> None:
        """Write the model in the recipe's type as a Hugging Face folder, with its tokenizer."""
        recipe = self._recipe
        dtype = DTYPES[recipe.training.dtype]
        write_decoder(folder, recipe.model, optimizer.masters(), dtype=dtype, overwrite=True)
        copy_tokenizer(tokenizer_folder(recipe), folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer, and how text is generated, beside weights."""
    for path in sorted(source.iterdir()):
        if path.name.startswith("tokenizer") or path.name == "generation_config.json":
            shutil.copyfile(path, folder / path.name)
