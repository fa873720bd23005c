"""How a run gets into its checkpoint folder: by one process at once, or by all while they train.

Knows files and processes, and nothing of models and data.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from jamba_lm.errors import InputError, JambaError
from jamba_lm.files import make_folder, sync_folder
from jamba_lm.training.checkpointing import SavedRun, clear_up, write_checkpoint
from jamba_lm.training.processes import Processes
from jamba_lm.training.sharded_files import write_index, write_part


class SoloSaver:
    """Saves for a process that is alone, before it goes on."""

    pending = False
    written = True

    def __init__(self, folder: Path, keep: int) -> None:
        """Save into `folder`, and keep the newest `keep` checkpoints."""
        self._folder = folder
        self._keep = keep

    def save(self, run: SavedRun) -> None:
        """Write a checkpoint.

        Raises:
            InputError: the operating system refused; what was there before is still there.
        """
        write_checkpoint(self._folder, run, keep=self._keep)

    def settle(self) -> None:
        """Do nothing: what was saved is there."""


class SharedSaver:
    """Saves for several processes, each its own part, while they go on training.

    A save copies what it is to write and leaves the writing to a thread. The parts lie in a hidden
    folder until all processes have written theirs and `settle` is called by all of them: then the
    first process writes the index, and gives the folder its name.

    Attributes:
        pending: whether a checkpoint waits to be settled.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        """Save into `folder`, and keep the newest `keep` checkpoints."""
        self._folder = folder
        self._keep = keep
        self._processes = processes
        self._thread: threading.Thread | None = None
        self._run: SavedRun | None = None
        self._error: JambaError | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun and not settled."""
        return self._run is not None

    @property
    def written(self) -> bool:
        """Whether this process has nothing more to write."""
        return self._thread is None or not self._thread.is_alive()

    def save(self, run: SavedRun) -> None:
        """Begin to write a checkpoint, after the one before is settled. Called by all processes.

        Raises:
            JambaError: the one before, or this one, cannot be written; the newest is whole.
        """
        self.settle()
        # Of the same step there can only be the same: nothing was computed since.
        if (self._folder / run.name).exists():
            return
        partial = self._partial(run)
        self._processes.lead(lambda: _make_anew(partial))
        copies = {name: _copy(tensor) for name, tensor in run.tensors.items()}
        self._run = replace(run, tensors=copies)
        self._error = None
        self._thread = threading.Thread(target=self._write, args=(partial, self._run))
        self._thread.start()

    def _partial(self, run: SavedRun) -> Path:
        return self._folder / f".{run.name}.partial"

    def _write(self, partial: Path, run: SavedRun) -> None:
        try:
            write_part(
                partial, self._processes.rank, self._processes.count, run.tensors, run.places
            )
        except JambaError as error:
            self._error = error

    def settle(self) -> None:
        """Wait until every process has written its part, and make the checkpoint appear.

        Raises:
            JambaError: a process could not write its part; the newest checkpoint is whole.
        """
        run = self._run
        if run is None or self._thread is None:
            return
        self._thread.join()
        self._thread = self._run = None
        partial = self._partial(run)
        try:
            self._processes.all_or_none(self._raise_error)
            self._processes.lead(lambda: self._finish(partial, run))
        except JambaError:
            if self._processes.leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _finish(self, partial: Path, run: SavedRun) -> None:
        path = self._folder / run.name
        write_index(partial, self._processes.count, run.metadata())
        try:
            partial.rename(path)
            sync_folder(self._folder)
            clear_up(self._folder, path, keep=self._keep)
        except OSError as error:
            raise InputError(
                f"cannot write {str(path)!r}: {error.strerror or error}; check the folder, its "
                "permissions and the free space"
            ) from error


def _copy(tensor: Tensor) -> Tensor:
    here = tensor.detach().to("cpu", copy=True)
    return here.contiguous()


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
