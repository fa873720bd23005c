"""Matrices kept as small integers: how they lie in memory, how they are made, what they stand for.

These layouts are those of the files too: a weight may be a memory map, and nothing is repacked when
it is loaded. Knows no model, and not which matrices are worth it.

Dimension key: O outputs (rows of the matrix), I inputs, J = I / group groups of one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of so many values are turned into floats at once: 16 MiB in float32.
VALUES_AT_ONCE = 1 << 22
INT8_LIMIT = 127
INT4_LIMIT = 15
GROUPS = (32, 64)
# Inputs that share 16 bytes: input j in the low and input j + 16 in the high half of byte j.
RUN = 32


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A matrix in 8 bits, symmetric, with one scale per row: w = values * scale.

    Attributes:
        values_OI: int8, contiguous; `quantize` uses -127 to 127.
        scale_O: float32, contiguous.
    """

    values_OI: Tensor
    scale_O: Tensor

    def __post_init__(self) -> None:
        """Check what a kernel relies on: the shapes, the types and the order of the bytes.

        Raises:
            ValueError: one of them is not as described above.
        """
        _check("values_OI", self.values_OI, torch.int8, 2, None)
        _check("scale_O", self.scale_O, torch.float32, 1, (self.values_OI.shape[0],))
        _check_together(self.values_OI, self.scale_O)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values_OI.shape[0], self.values_OI.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.values_OI.device

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it, by name."""
        return {"values": self.values_OI, "scale": self.scale_O}

    def rows(self, first: int, end: int) -> Int8Weight:
        """Return some of the rows, as a view."""
        return Int8Weight(self.values_OI[first:end], self.scale_O[first:end])

    def take(self, rows_M: Tensor) -> Int8Weight:
        """Return the rows of these numbers, int64, as a copy."""
        return Int8Weight(self.values_OI[rows_M], self.scale_O[rows_M])

    def to(self, device: torch.device) -> Int8Weight:
        """Return the same weight on `device`; itself when it is there."""
        if device == self.device:
            return self
        return Int8Weight(self.values_OI.to(device), self.scale_O.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix `[O, I]` that this stands for, rounded to `dtype` once."""
        return (self.values_OI.float() * self.scale_O[:, None]).to(dtype)

    @classmethod
    def quantize(cls, weight_OI: Tensor) -> Int8Weight:
        """Round a matrix: the largest value of a row becomes 127 or -127, zero stays zero.

        Args:
            weight_OI: any float dtype, finite.
        """
        rows, columns = weight_OI.shape
        values_OI = torch.empty(rows, columns, dtype=torch.int8, device=weight_OI.device)
        scale_O = torch.empty(rows, dtype=torch.float32, device=weight_OI.device)
        for first, end in row_blocks(rows, columns):
            wide_OI = weight_OI[first:end].float()
            part_O = wide_OI.abs().amax(-1) / INT8_LIMIT
            scale_O[first:end] = part_O
            steps_OI = (wide_OI / _divisor(part_O)[:, None]).round_()
            # A scale so small that it was rounded itself may leave a quotient beyond the limit.
            values_OI[first:end] = steps_OI.clamp_(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
        return cls(values_OI, scale_O)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A matrix in 4 bits, with a scale and a minimum per group of a row: w = q * scale + minimum.

    Each 32 consecutive inputs of a row are 16 bytes: byte j holds input j in its low and input
    j + 16 in its high four bits, so that one mask and one shift give 16 neighbours each.

    Attributes:
        packed: uint8 `[O, I / 2]`, contiguous: q of 0 to 15.
        scale_OJ: bfloat16, contiguous; 32 or 64 inputs share one.
        minimum_OJ: bfloat16, contiguous: what q = 0 stands for.
    """

    packed: Tensor
    scale_OJ: Tensor
    minimum_OJ: Tensor

    def __post_init__(self) -> None:
        """Check what a kernel relies on: the shapes, the types and the order of the bytes.

        Raises:
            ValueError: one of them is not as described above.
        """
        _check("packed", self.packed, torch.uint8, 2, None)
        rows, half = self.packed.shape
        _check("scale_OJ", self.scale_OJ, torch.bfloat16, 2, None)
        if self.scale_OJ.shape[0] != rows or half * 2 not in {
            self.scale_OJ.shape[1] * group for group in GROUPS
        }:
            raise ValueError(
                f"scale_OJ has shape {tuple(self.scale_OJ.shape)}: for {rows} rows of {2 * half} "
                f"inputs, expected one scale per {' or '.join(map(str, GROUPS))} inputs"
            )
        _check("minimum_OJ", self.minimum_OJ, torch.bfloat16, 2, tuple(self.scale_OJ.shape))
        _check_together(self.packed, self.scale_OJ, self.minimum_OJ)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.packed.device

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.shape[1] // self.scale_OJ.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it, by name."""
        return {"packed": self.packed, "scale": self.scale_OJ, "minimum": self.minimum_OJ}

    def rows(self, first: int, end: int) -> Int4Weight:
        """Return some of the rows, as a view."""
        return Int4Weight(
            self.packed[first:end], self.scale_OJ[first:end], self.minimum_OJ[first:end]
        )

    def take(self, rows_M: Tensor) -> Int4Weight:
        """Return the rows of these numbers, int64, as a copy."""
        return Int4Weight(self.packed[rows_M], self.scale_OJ[rows_M], self.minimum_OJ[rows_M])

    def to(self, device: torch.device) -> Int4Weight:
        """Return the same weight on `device`; itself when it is there."""
        if device == self.device:
            return self
        return Int4Weight(
            self.packed.to(device), self.scale_OJ.to(device), self.minimum_OJ.to(device)
        )

    def steps(self) -> Tensor:
        """Return the unpacked integers, uint8 `[O, I]`."""
        rows, columns = self.shape
        runs = self.packed.reshape(rows, -1, RUN // 2)
        return torch.cat([runs & 15, runs >> 4], dim=-1).reshape(rows, columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix `[O, I]` that this stands for, rounded to `dtype` once."""
        grouped = self.steps().float().reshape(*self.scale_OJ.shape, self.group)
        grouped.mul_(self.scale_OJ.float()[..., None]).add_(self.minimum_OJ.float()[..., None])
        return grouped.reshape(self.shape).to(dtype)

    @classmethod
    def on_grid(cls, weight_OI: Tensor, scale_OJ: Tensor, minimum_OJ: Tensor) -> Int4Weight:
        """Round a matrix to the nearest values of given grids.

        Args:
            weight_OI: any float dtype, finite.
            scale_OJ: bfloat16, one per group.
            minimum_OJ: bfloat16, likewise.
        """
        rows, columns = weight_OI.shape
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight_OI.device)
        for first, end in row_blocks(rows, columns):
            scale_OJ1 = _divisor(scale_OJ[first:end].float())[..., None]
            grouped = weight_OI[first:end].float().reshape(*scale_OJ1.shape[:2], -1)
            steps = (grouped - minimum_OJ[first:end].float()[..., None]).div_(scale_OJ1)
            steps = steps.round_().clamp_(0, INT4_LIMIT).to(torch.uint8)
            packed[first:end] = pack(steps.reshape(end - first, columns))
        return cls(packed, scale_OJ, minimum_OJ)


PackedWeight = Int8Weight | Int4Weight


def pack(steps_OI: Tensor) -> Tensor:
    """Pack integers of 0 to 15, uint8 `[O, I]`, two to a byte.

    >>> steps = torch.arange(32, dtype=torch.uint8)[None] % 16
    >>> [hex(byte) for byte in pack(steps)[0, :3].tolist()]
    ['0x0', '0x11', '0x22']
    """
    rows, columns = steps_OI.shape
    runs = steps_OI.reshape(rows, columns // RUN, 2, RUN // 2)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(rows, columns // 2)


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut the rows of a matrix into blocks of at most `VALUES_AT_ONCE` values, or of one row."""
    block = max(1, VALUES_AT_ONCE // max(1, columns))
    return [(first, min(first + block, rows)) for first in range(0, rows, block)]


def _divisor(scale: Tensor) -> Tensor:
    # Where all values are equal the scale is zero, and so is every numerator.
    return torch.where(scale > 0, scale, 1.0)


def _check(
    name: str, x: Tensor, dtype: torch.dtype, axes: int, shape: tuple[int, ...] | None
) -> None:
    if x.dtype is not dtype or x.dim() != axes or not x.is_contiguous():
        order = "contiguous" if x.is_contiguous() else "strided"
        raise ValueError(
            f"{name} is {order} {x.dtype} of shape {tuple(x.shape)}: "
            f"expected contiguous {dtype} of {axes} axes"
        )
    if shape is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")


def _check_together(*tensors: Tensor) -> None:
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"the parts of a weight are on {sorted(map(str, devices))}: expected one")
