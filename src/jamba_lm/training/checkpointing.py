"""A run on disk: everything needed to go on with it bit for bit, in one file.

Knows names and numbers, and neither models nor data. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from jamba_lm.corpus.mixture import MixedPosition
from jamba_lm.data import Position
from jamba_lm.errors import CheckpointError
from jamba_lm.files import parse_json
from jamba_lm.tensor_file import TensorFile, write_tensors

FORMAT = "jamba_lm training 1"
_NAME = re.compile(r"step-(\d{9})\.safetensors")


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
        tensors: the optimizer's, by name; mapped from the file.
    """

    progress: Progress
    recipe: Mapping[str, Any]
    data: str
    threads: int
    tensors: Mapping[str, Tensor]


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
    path = folder / f"step-{run.progress.steps_done:09d}.safetensors"
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(asdict(run.progress)),
        "recipe": json.dumps(run.recipe),
        "data": run.data,
        "threads": str(run.threads),
    }
    write_tensors(path, dict(run.tensors), metadata)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    # A process that was killed while it wrote left its temporary file behind.
    for stray in folder.glob(".step-*.tmp"):
        stray.unlink()
    return path


def _position(value: Mapping[str, Any] | None) -> Position | MixedPosition | None:
    if value is None:
        return None
    return MixedPosition.from_json(value) if "sources" in value else Position(**value)


def read_checkpoint(path: Path) -> SavedRun:
    """Read a checkpoint.

    Raises:
        CheckpointError: damaged, or not a training checkpoint of this version.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is not a training checkpoint of this version: its format is "
            f"{file.metadata.get('format')!r}, expected {FORMAT!r}"
        )
    what = f"the metadata of {str(path)!r}"

    def section(name: str) -> dict[str, Any]:
        return parse_json(
            file.metadata.get(name, "").encode(), f"{name} in {what}", CheckpointError
        )

    values = section("progress")
    try:
        values["position"] = _position(values["position"])
        values["recent_losses"] = tuple(map(float, values.get("recent_losses", ())))
        progress = Progress(**values)
        threads = int(file.metadata["threads"])
        data = file.metadata["data"]
    except (KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(
            f"{what} is not what a training run writes; remove the file to resume from an older one"
        ) from cause
    tensors = {name: file.tensor(name) for name in file.names}
    return SavedRun(
        progress=progress, recipe=section("recipe"), data=data, threads=threads, tensors=tensors
    )
