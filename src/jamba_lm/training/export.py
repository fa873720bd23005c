"""A run's weights as a Hugging Face folder, one tensor at a time.

Knows a run's checkpoints and its tokenizer, and nothing of how it was trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from jamba_lm.checkpoint.huggingface import DTYPES, write_decoder
from jamba_lm.errors import InputError
from jamba_lm.training.checkpointing import checkpoints, read_checkpoint
from jamba_lm.training.optimizer import PARTS
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.run_text import tokenizer_folder


def export_weights(recipe: Recipe, masters: Mapping[str, Tensor], folder: Path) -> None:
    """Write the model in the recipe's type as a Hugging Face folder, with its tokenizer.

    Args:
        recipe: of the run.
        masters: the float32 weights by the decoder's names; each is asked for when it is written.
        folder: where to; a model that is there is replaced.

    Raises:
        InputError: the operating system refused.
        CheckpointError: the weights are not of the recipe's model.
        CapacityError: the disk has too little free space.
    """
    dtype = DTYPES[recipe.training.dtype]
    write_decoder(folder, recipe.model, masters, dtype=dtype, overwrite=True)
    for path in sorted(tokenizer_folder(recipe).iterdir()):
        if path.name.startswith("tokenizer") or path.name == "generation_config.json":
            shutil.copyfile(path, folder / path.name)


def export_newest(recipe: Recipe, run: Path, folder: Path) -> int:
    """Write the weights of the newest checkpoint of a run, whichever mesh saved it.

    Args:
        recipe: of the run.
        run: its folder.
        folder: where to.

    Returns:
        The step that the checkpoint was written after.

    Raises:
        InputError: there is no checkpoint, or the operating system refused.
        CheckpointError: the checkpoint is damaged, or not of the recipe's model.
        CapacityError: the disk has too little free space.
    """
    found = checkpoints(run / "checkpoints")
    if not found:
        raise InputError(
            f"no checkpoint in {str(run)!r}: expected the folder of a run that was saved once"
        )
    saved = read_checkpoint(found[-1])
    export_weights(recipe, _Masters(saved.tensors), folder)
    return saved.progress.steps_done


class _Masters(Mapping[str, Tensor]):
    """The weights among what a checkpoint holds, by the decoder's names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._prefix = f"{PARTS[0]}."

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            if name.startswith(self._prefix):
                yield name.removeprefix(self._prefix)

    def __len__(self) -> int:
        return sum(1 for _ in self)
