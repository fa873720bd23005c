"""Folders of columns: long arrays that grow row by row and appear whole or not at all.

What tasks hand to each other. A folder has the name of its task only when everything in it has
reached the disk, so its being there is the record that the task was done. Nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jamba_lm.errors import DataError, InputError
from jamba_lm.files import make_folder, read_json, sync_folder, write_json

Array = np.ndarray[Any, np.dtype[Any]]

META = "columns.json"
_BUFFER_BYTES = 2**20


class ColumnWriter:
    """Columns that are written front to back.

    Attributes:
        info: written beside them; whatever JSON can hold.
    """

    def __init__(self, folder: Path, kinds: Mapping[str, tuple[str, int]]) -> None:
        self.info: dict[str, Any] = {}
        self._folder = folder
        self._kinds = dict(kinds)
        self._rows = dict.fromkeys(kinds, 0)
        self._files: dict[str, BinaryIO] = {}

    def append(self, name: str, rows: Array) -> None:
        """Write rows of one column: an array of its type, [rows] or [rows, width]."""
        dtype, width = self._kinds[name]
        assert rows.dtype == np.dtype(dtype), (name, rows.dtype)
        assert rows.size % width == 0, (name, rows.shape)
        if name not in self._files:
            self._files[name] = (self._folder / name).open("xb", buffering=_BUFFER_BYTES)
        self._files[name].write(np.ascontiguousarray(rows).data)
        self._rows[name] += rows.size // width

    def finish(self) -> None:
        """Bring everything to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        columns = {
            name: {"dtype": dtype, "width": width, "rows": self._rows[name]}
            for name, (dtype, width) in self._kinds.items()
        }
        write_json(self._folder / META, {"columns": columns, "info": self.info})

    def close(self) -> None:
        """Close the files, whatever has become of them."""
        for file in self._files.values():
            # What is still buffered has nowhere to go when the disk is full; it is not wanted.
            try:
                file.close()
            except OSError:
                continue


@contextmanager
def new_columns(folder: Path, kinds: Mapping[str, tuple[str, int]]) -> Iterator[ColumnWriter]:
    """Write a folder of columns, which is there only if the `with` block ends well.

    Args:
        folder: to be made; what was left of an earlier attempt is removed.
        kinds: the type and the width of a row of every column.

    Raises:
        InputError: the system refused: the disk is full, say.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with refused_as_input_error(folder):
        if temporary.exists():
            shutil.rmtree(temporary)
        make_folder(temporary)
        writer = ColumnWriter(temporary, kinds)
        try:
            yield writer
            writer.finish()
            writer.close()
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            writer.close()
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def refused_as_input_error(path: Path) -> Iterator[None]:
    """Say which file could not be written, and that running again goes on from here."""
    try:
        yield
    except OSError as cause:
        raise InputError(
            f"cannot write {str(path)!r}: {cause.strerror or cause}; what was finished before is "
            "kept, so make room and run the same command again"
        ) from cause


class Columns:
    """A folder of columns, mapped into memory.

    Attributes:
        info: what was written beside them.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            DataError: it is missing, damaged or incomplete.
        """
        meta = read_json(folder / META, "intermediate result", DataError, 2**30)
        self._folder = folder
        try:
            self._columns: dict[str, Any] = dict(meta["columns"])
            self.info: dict[str, Any] = dict(meta["info"])
        except (KeyError, TypeError, ValueError) as cause:
            raise self._damaged("its list of columns is not what was written") from cause

    def __getitem__(self, name: str) -> Array:
        """Return a column, [rows] or [rows, width]."""
        column = self._columns[name]
        dtype, width, rows = np.dtype(column["dtype"]), column["width"], column["rows"]
        shape = (rows,) if width == 1 else (rows, width)
        if not rows:
            return np.empty(shape, dtype)
        path = self._folder / name
        try:
            size = path.stat().st_size
            if size != rows * width * dtype.itemsize:
                raise self._damaged(f"{name} has {size:,} bytes")
            return np.memmap(path, dtype, "r", shape=shape)
        except OSError as cause:
            raise self._damaged(f"{name}: {cause.strerror or cause}") from cause

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"the intermediate result {str(self._folder)!r} is damaged: {reason}; remove this "
            "folder and run the same command again"
        )
