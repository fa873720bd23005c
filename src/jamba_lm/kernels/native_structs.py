"""Matrices as the library is told of them: what lies where. Needs no torch.

O outputs (rows of the matrix), I inputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

# JAMBA_F32 .. JAMBA_INT4 of native/jamba_kernels.h.
F32_KIND, BF16_KIND, INT8_KIND, INT4_KIND = range(4)

# JAMBA_STEP_ROWS: up to so many rows, reading the matrix costs more than multiplying.
FEW_ROWS = 16


class RowRounding(IntEnum):
    """Whether many bfloat16 rows that meet a packed matrix may be rounded to 8 bits as well.

    They are where the processor multiplies such numbers faster; the values are JAMBA_ROWS_KEPT ..
    JAMBA_ROWS8 of native/jamba_kernels.h.
    """

    NONE = 0
    BY_GROUP = 1  # with a scale for each 64 inputs
    BY_ROW = 2  # so, or with one scale for the row


class MatrixStruct(ctypes.Structure):
    """`jamba_matrix` of native/jamba_kernels.h."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("O", ctypes.c_int64),
        ("I", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows8", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix where it lies.

    Attributes:
        struct: what the library is told.
        owners: what keeps the memory that the struct points into.
    """

    struct: MatrixStruct
    owners: tuple[object, ...]

    @property
    def type(self) -> tuple[int, int]:
        """What matrices share that can meet the same arrangement of rows."""
        return self.struct.kind, self.struct.group
