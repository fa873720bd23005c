"""A shard: tokens of many documents in one file, mapped into memory when read.

The file is safetensors, so others can read it too: `ids` (U16 or U32), `starts` (I64, where each
document starts, and the end), `num_bytes` (I64, UTF-8 bytes of each document) and `hashes` (U8
[documents, 16], of each document's text). Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jamba_lm.errors import DataError
from jamba_lm.files import parse_json, write_atomic

Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = "jamba_lm shard 1"
_CODES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I64": "<i8"}
_ALIGNMENT = 64
_MAXIMUM_HEADER_BYTES = 2**20


def write_shard(
    path: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Iterable[Array],
    metadata: Mapping[str, str],
) -> str:
    """Write a shard, whole or not at all, and return the sha256 of its bytes.

    Args:
        path: the file.
        specs: code of the type and shape of every array, in the order of the data.
        pieces: the data of all arrays, one after the other, in pieces of any size.
        metadata: texts for the header.

    Raises:
        InputError: the system refused.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, **metadata}}
    place = 0
    for name, (code, shape) in specs.items():
        size = math.prod(shape) * np.dtype(_CODES[code]).itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    # The data starts at a multiple of the alignment, behind the eight bytes of the length.
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        written = 0
        for piece in (len(header).to_bytes(8, "little"), header):
            digest.update(piece)
            file.write(piece)
        for array in pieces:
            data = np.ascontiguousarray(array).data
            digest.update(data)
            file.write(data)
            written += array.nbytes
        assert written == place, (written, place)

    write_atomic(path, write)
    return digest.hexdigest()


class Shard:
    """A shard, mapped into memory.

    Attributes:
        metadata: texts of the header.
        ids: all documents, end to end.
        starts: int64 [documents + 1].
        num_bytes: int64 [documents].
        hashes: uint8 [documents, 16].
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check that it is whole.

        Raises:
            DataError: it is missing, damaged, or not a shard.
        """
        self._path = path
        header, start = self._header()
        arrays: dict[str, Array] = {}
        end = 0
        try:
            self.metadata: dict[str, str] = dict(header.pop("__metadata__"))
            if self.metadata["format"] != FORMAT:
                raise self._damaged(f"its format is {self.metadata['format']!r}")
            for name, entry in header.items():
                dtype, shape = np.dtype(_CODES[entry["dtype"]]), tuple(entry["shape"])
                first, last = entry["data_offsets"]
                if first != end or last - first != math.prod(shape) * dtype.itemsize:
                    raise self._damaged(f"{name} has a wrong size")
                if math.prod(shape):
                    arrays[name] = np.memmap(path, dtype, "r", start + first, shape)
                else:
                    arrays[name] = np.empty(shape, dtype)
                end = last
            size = path.stat().st_size
            if size != start + end:
                raise self._damaged(f"it has {size:,} bytes instead of {start + end:,}")
            self.ids, self.starts = arrays["ids"], arrays["starts"]
            self.num_bytes, self.hashes = arrays["num_bytes"], arrays["hashes"]
        except (KeyError, TypeError, ValueError) as cause:
            raise self._damaged("its header is not that of a shard") from cause
        except OSError as cause:
            raise self._damaged(cause.strerror or str(cause)) from cause
        # mmap's ValueError for a short file is the same as a wrong size.
        if len(self.starts) != len(self.num_bytes) + 1 or self.starts[-1] != len(self.ids):
            raise self._damaged("its arrays do not belong together")

    def _header(self) -> tuple[dict[str, Any], int]:
        try:
            with self._path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _MAXIMUM_HEADER_BYTES:
                    raise self._damaged("it does not begin with a header")
                data = file.read(length)
        except OSError as cause:
            raise DataError(
                f"cannot read the shard {str(self._path)!r}: {cause.strerror or cause}"
            ) from cause
        return parse_json(data, f"the header of {str(self._path)!r}", DataError), 8 + length

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{str(self._path)!r} is not a whole shard: {reason}; prepare the corpus again"
        )

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, with the end tokens and without beginnings."""
        return len(self.ids)
