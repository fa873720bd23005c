"""Tensors on disk, as native code reads them: mapped into memory, and described by address.

The same files as `tensor_file.py` opens, for programs that do without torch. Knows the format, and
nothing of what the tensors mean. Nothing is ever unpickled.

Source: the safetensors format (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jamba_lm.errors import CheckpointError

# Bytes of a value, of the types that native code reads.
ITEM_BYTES = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor in the map of a file.

    Attributes:
        code: its type, as the format names it.
        shape: its extents.
        data: its bytes, a view of the map, which lives as long.
    """

    code: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def address(self) -> int:
        """Where its first value lies."""
        return self.data.ctypes.data

    @property
    def is_aligned(self) -> bool:
        """Whether its values lie at multiples of their size."""
        return self.address % ITEM_BYTES[self.code] == 0

    def floats(self) -> NDArray[np.float32]:
        """Return a copy of its values, which are F32 or BF16, in its shape."""
        if self.code == "F32":
            return self.data.view(np.float32).reshape(self.shape).copy()
        assert self.code == "BF16"
        # The upper half of a float32.
        wide = self.data.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(self.shape)


def map_tensors(path: Path) -> dict[str, MappedTensor]:
    """Map a safetensors file into memory and return its tensors, none of which is read by this.

    Raises:
        CheckpointError: it is not a sound safetensors file, or holds another type than those of
            `ITEM_BYTES`.
    """
    try:
        with safe_open(path, framework="numpy"):
            # The library has checked that what the header says of the data is true.
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        # A view of a memmap is a memmap, whose making takes ten times as long as an array's.
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (SafetensorError, OSError, ValueError, OverflowError) as broken:
        raise CheckpointError(f"{path} is not a sound safetensors file ({broken})") from broken
    first = _LENGTH_BYTES + length
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {name!r} is {entry['dtype']}")
        begin, end = entry["data_offsets"]
        view = data[first + begin : first + end]
        tensors[name] = MappedTensor(entry["dtype"], tuple(entry["shape"]), view)
    return tensors
