"""The records of a run as TensorBoard's scalars, beside its log.

Knows records, and nothing of what they are about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from jamba_lm.errors import InputError

FOLDER = "tensorboard"


class TensorBoardLog:
    """Event files in the run's folder, cut back to a step when a run is resumed."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        """Open the event files and hide what was written after `steps_done`.

        Raises:
            InputError: the package is not installed, or the folder cannot be written to.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as cause:
            raise InputError(
                "watch.tensorboard is true, but tensorboard is not installed: "
                "pip install 'jamba-lm[train]', or set it to false"
            ) from cause
        self._folder = folder / FOLDER
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=steps_done + 1)
        except OSError as cause:
            raise self._refused(cause) from cause

    def _refused(self, cause: OSError) -> InputError:
        return InputError(
            f"cannot write {str(self._folder)!r}: {cause.strerror or cause}; make room, or set "
            "watch.tensorboard to false, and resume: the newest checkpoint is whole"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
        except OSError as cause:
            # What ended the run says more than that the last numbers could not be written either.
            if kind is None:
                raise self._refused(cause) from cause

    def write(self, record: Mapping[str, Any]) -> None:
        """Add every number of a record, by its event and name.

        Raises:
            InputError: the operating system refused: the disk is full, say.
        """
        try:
            for name, value in _numbers(record["event"], record):
                self._writer.add_scalar(name, value, record["step"])
        except OSError as cause:
            raise self._refused(cause) from cause


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key != "step":
                yield from _numbers(f"{name}/{key}", one)
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _numbers(f"{name}/{number}", one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
