"""The folder of a training run: its log, its lock, and the record of what it was run with.

Knows files and the machine, not models.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch

from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.files import make_folder, write_json

LOG = "log.jsonl"
RECORDED_PACKAGES = ("jamba-lm", "torch", "numpy", "tokenizers", "safetensors")


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder for one process: two runs in one folder would destroy each other's log.

    The lock goes away with the process, however that ends.

    Raises:
        InputError: another process is training into this folder.
    """
    make_folder(folder)
    with _open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise InputError(
                f"another process is training into {str(folder)!r}: wait for it, or take another "
                "--out folder"
            ) from cause
        yield


class RunLog:
    """A JSON object a line, flushed at once; cut back to a checkpoint when a run is resumed."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Open the log and forget what was written after its first `num_bytes`.

        Raises:
            CheckpointError: the log is shorter than that.
        """
        self._path = folder / LOG
        self._file = _open(self._path)
        if self._file.tell() < num_bytes:
            raise CheckpointError(
                f"{str(self._path)!r} has {self._file.tell():,} bytes, but the checkpoint was "
                f"written after {num_bytes:,}; was the log cut or replaced?"
            )
        self._file.truncate(num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            InputError: the operating system refused: the disk is full, say.
        """
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as cause:
            raise self._refused(cause) from cause

    def _refused(self, cause: OSError) -> InputError:
        return InputError(
            f"cannot write {str(self._path)!r}: {cause.strerror or cause}; make room and resume: "
            "the newest checkpoint is whole"
        )

    def sync(self) -> int:
        """Bring everything written to the disk and return the length of the log.

        Raises:
            InputError: the operating system refused.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as cause:
            raise self._refused(cause) from cause
        return self._file.tell()


def _open(path: Path) -> FileIO:
    # Unbuffered: what was written is in the file, and closing it has nothing left to fail at.
    try:
        return path.open("ab", buffering=0)
    except OSError as cause:
        raise InputError(
            f"cannot write {str(path)!r}: {cause.strerror or cause}; check the folder and its "
            "permissions"
        ) from cause


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what a run was run with to `run.json`."""
    write_json(folder / "run.json", dict(record))


def machine_record() -> dict[str, Any]:
    """Describe what computes: versions, processor, threads, and the commit when there is one."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed: run from a checkout"
    # Which build it is, with CUDA or without, is no part of the package's version.
    versions["torch"] = str(torch.__version__)
    return {
        "versions": versions,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": source_commit(),
    }


def source_commit() -> str | None:
    """Return the git commit of the source that is running; None outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "log", "-1", "--format=%H", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    # Outside a repository git fails; in somebody else's it knows no commit of these files.
    return done.stdout.strip() or None
