"""A run on disk: everything needed to go on with it bit for bit.

A process alone writes one file, several write a folder (`sharded_files`); either is read by either.
Knows names and numbers, and neither models nor data. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jamba_lm.corpus.mixture import MixedPosition
from jamba_lm.data import Position
from jamba_lm.errors import CheckpointError
from jamba_lm.files import parse_json
from jamba_lm.tensor_file import TensorFile, write_tensors
from jamba_lm.training.places import Place
from jamba_lm.training.sharded_files import dtype_of, read_index, shape_of

FORMAT = "jamba_lm training 1"
_NAME = re.compile(r"step-(\d{9})(\.safetensors)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        steps_done: optimizer steps.
        tokens_seen: tokens that went through the model in them.
        position: where the data goes on.
        log_bytes: length of the log at this point; what comes after belongs to steps that a
            resumed run takes again.
        recent_losses: of the last steps, with which the next one's is compared.
    """

    steps_done: int = 0
    tokens_seen: int = 0
    position: Position | MixedPosition | None = None
    log_bytes: int = 0
    recent_losses: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What a training checkpoint holds.

    Attributes:
        progress: how far the run had come.
        recipe: the sections of its recipe.
        data: fingerprint of the tokens it was reading.
        threads: CPU threads it computed with; another number sums in another order.
        tensors: the optimizer's, by name; mapped from the file, or what this process is to save.
        places: of what each tensor is a part, and where in it, when several processes save theirs.
    """

    progress: Progress
    recipe: Mapping[str, Any]
    data: str
    threads: int
    tensors: Mapping[str, Tensor]
    places: Mapping[str, tuple[str, Place]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the checkpoint is called."""
        return f"step-{self.progress.steps_done:09d}"

    def metadata(self) -> dict[str, str]:
        """Return everything but the tensors, as it is written."""
        return {
            "progress": json.dumps(asdict(self.progress)),
            "recipe": json.dumps(self.recipe),
            "data": self.data,
            "threads": str(self.threads),
        }


def checkpoints(folder: Path) -> list[Path]:
    """List the training checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def write_checkpoint(folder: Path, run: SavedRun, *, keep: int) -> Path:
    """Write a checkpoint, whole or not at all, then remove all but the newest `keep`.

    Raises:
        InputError: the operating system refused; what was there before is still there.
    """
    path = folder / f"{run.name}.safetensors"
    write_tensors(path, dict(run.tensors), {"format": FORMAT, **run.metadata()})
    clear_up(folder, path, keep=keep)
    return path


def clear_up(folder: Path, newest: Path, *, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, and what killed processes left behind."""
    for old in checkpoints(folder):
        # The same step, saved by another number of processes.
        if old.name.partition(".")[0] == newest.name.partition(".")[0] and old != newest:
            _remove(old)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    for stray in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.partial")):
        _remove(stray)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Renamed first: a kill in between must not leave a checkpoint without some of its parts.
        doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.partial")
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink()


def _position(value: Mapping[str, Any] | None) -> Position | MixedPosition | None:
    if value is None:
        return None
    return MixedPosition.from_json(value) if "sources" in value else Position(**value)


def read_checkpoint(path: Path) -> SavedRun:
    """Read a checkpoint, whoever wrote it.

    Raises:
        CheckpointError: damaged, incomplete, or not a training checkpoint of this version.
    """
    if path.is_dir():
        metadata, stored = read_index(path)
        return _saved_run(path, metadata, stored)
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is not a training checkpoint of this version: its format is "
            f"{file.metadata.get('format')!r}, expected {FORMAT!r}"
        )
    return _saved_run(path, file.metadata, {name: file.tensor(name) for name in file.names})


def _saved_run(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SavedRun:
    what = f"the metadata of {str(path)!r}"

    def section(name: str) -> dict[str, Any]:
        text = str(metadata.get(name, ""))
        return parse_json(text.encode(), f"{name} in {what}", CheckpointError)

    values = section("progress")
    try:
        values["position"] = _position(values["position"])
        values["recent_losses"] = tuple(map(float, values.get("recent_losses", ())))
        progress = Progress(**values)
        threads = int(metadata["threads"])
        data = str(metadata["data"])
    except (KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(
            f"{what} is not what a training run writes; remove the file to resume from an older one"
        ) from cause
    return SavedRun(
        progress=progress, recipe=section("recipe"), data=data, threads=threads, tensors=tensors
    )


def check_fit(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Make sure that saved tensors are those of an optimizer.

    Args:
        shapes: of the optimizer's tensors, by name.
        tensors: that were saved.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or not float32.
    """
    differing = sorted(shapes.keys() ^ tensors.keys())
    differing += sorted(
        name
        for name in shapes.keys() & tensors.keys()
        if shapes[name] != shape_of(tensors, name) or dtype_of(tensors, name) != torch.float32
    )
    if differing:
        raise CheckpointError(
            f"the training checkpoint does not fit the model of the recipe: {len(differing)} "
            f"tensors differ, the first is {differing[0]!r}; use the recipe it was made with"
        )
