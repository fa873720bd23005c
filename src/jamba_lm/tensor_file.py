"""Tensors on disk: safetensors files, read as memory maps and written whole or not at all.

Knows the file format, and nothing of what the tensors mean. Nothing is ever unpickled.

Source: the safetensors format (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jamba_lm.errors import CheckpointError, JambaError
from jamba_lm.files import write_atomic

# The names of the format, for the dtypes that this project reads or writes.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

# The data starts at a multiple of this, so that mapped tensors are aligned.
ALIGNMENT = 64
WRITE_PIECE_BYTES = 16 * 2**20

TensorSpec = tuple[str, torch.dtype, Sequence[int]]


class TensorFile:
    """A safetensors file, opened for reading. A context manager.

    Tensors share the memory map: they cost no memory until they are read, and the system can drop
    their pages again.
    """

    def __init__(self, path: str | Path, error: type[JambaError] = CheckpointError) -> None:
        """Open `path` and check its header.

        Args:
            path: the file.
            error: what to raise, so that a broken state is not called a broken checkpoint.

        Raises:
            JambaError: of type `error`: no such file, or not a sound safetensors file.
        """
        self.path = Path(path)
        self._error = error
        if not self.path.is_file():
            raise error(f"no file at {self.path}: expected a safetensors file")
        try:
            self._file = safe_open(self.path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.names: tuple[str, ...] = tuple(self._file.keys())
            slices = {name: self._file.get_slice(name) for name in self.names}
            self._codes = {name: piece.get_dtype() for name, piece in slices.items()}
            self._shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        except (SafetensorError, OSError, ValueError, OverflowError) as broken:
            raise error(
                f"{self.path} is not a sound safetensors file ({_one_line(broken)}): "
                "it may be cut short; get it again"
            ) from broken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Tensors already taken stay valid: they hold the map."""
        self._file.__exit__(None, None, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it.

        Raises:
            JambaError: a dtype that this project has no use for (8-bit floats, complex numbers).
        """
        code = self._codes[name]
        if code not in DTYPES:
            raise self._error(
                f"{self.path}: tensor {name!r} has dtype {code}; expected one of "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[code]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that shares the memory map."""
        self.dtype(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as broken:
            raise self._error(
                f"{self.path}: cannot read tensor {name!r} ({_one_line(broken)})"
            ) from broken


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file: beside its place first, then renamed, so it is whole or absent."""
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensor_stream(path, specs, tensors.values(), metadata)


def write_tensor_stream(
    path: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that are made one at a time.

    Args:
        path: where to; an existing file is replaced at the end, in one step.
        specs: name, dtype and shape of each tensor, in the order of `tensors`.
        tensors: the values; each may be dropped as soon as the next is asked for.
        metadata: strings for the header.
    """
    names = (name for name, _, _ in specs)
    write_tensors_as_made(path, specs, zip(names, tensors, strict=True), metadata)


def write_tensors_as_made(
    path: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that are made one at a time, in any order.

    Args:
        path: where to; an existing file is replaced at the end, in one step.
        specs: name, dtype and shape of each tensor, in the order of the file: wider types first, so
            that every tensor is aligned to its type.
        tensors: names and values, each name once; a value may be dropped as soon as the next is
            asked for.
        metadata: strings for the header.
    """
    header = _header(specs, metadata)
    places, first = {}, 8 + len(header)
    for name, dtype, shape in specs:
        places[name] = first, dtype, tuple(shape)
        first += _num_bytes(dtype, shape)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, tensor in tensors:
            place, dtype, shape = places.pop(name)
            assert tensor.dtype == dtype, name
            assert tuple(tensor.shape) == shape, name
            file.seek(place)
            for piece in _pieces(tensor):
                file.write(piece)
        assert not places, f"never made: {list(places)}"

    write_atomic(Path(path), write)


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    first = 0
    for name, dtype, shape in specs:
        size = _num_bytes(dtype, shape)
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [first, first + size],
        }
        first += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % ALIGNMENT)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    # In pieces: a copy of a strided or mapped tensor of gigabytes is never whole in memory.
    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    for piece in flat.split(WRITE_PIECE_BYTES):
        yield piece.numpy().data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
