"""Kernels read no byte past the end of a matrix: behind it there may be the end of the file.

Each matrix is put where the page after its last byte may not be read. That ends the process, so
the products are made in another one.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_products import float_linear
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.kernels.packed_weights import PackedWeight
from tests.kernels.matrices import KINDS, fits

ROOT = Path(__file__).resolve().parents[2]
PATHS = loaded_library().paths_here
# Inputs that fill no step, one step and a part, several; rows that take every tile, few and many.
INPUTS = (5, 32, 33, 96, 128, 160, 200, 3104)
ROWS = (1, 2, 3, 4, 7, 20)
OUTPUTS = 19


def at_the_end_of_a_page(tensor: Tensor) -> Tensor:
    """Copy a tensor to where it ends right before a page that may not be read."""
    size = tensor.numel() * tensor.element_size()
    whole = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    copy = copy.view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() + size == end
    return copy


def guarded(weight: Tensor | PackedWeight) -> Tensor | PackedWeight:
    """Put every tensor of a matrix at the end of a page of its own."""
    if isinstance(weight, Tensor):
        return at_the_end_of_a_page(weight)
    tensors = {one.name: at_the_end_of_a_page(getattr(weight, one.name)) for one in fields(weight)}
    return replace(weight, **tensors)


def multiply_all(path: str) -> None:
    """Multiply by guarded matrices of all kinds and sizes; the results are those without guards."""
    for kind, make in KINDS.items():
        for inputs in INPUTS:
            if not fits(kind, inputs):
                continue
            weight = make(torch.randn(OUTPUTS, inputs))
            for rows in ROWS:
                for dtype, rows8 in product((torch.float32, torch.bfloat16), RowRounding):
                    x = torch.randn(rows, inputs).to(dtype)
                    y = float_linear(x, guarded(weight), rows8=rows8, path=path)
                    expected = float_linear(x, weight, rows8=rows8, path=path)
                    assert torch.equal(y, expected), (kind, inputs, rows, dtype, rows8)
    print("read nothing else")


def read_one_more() -> None:
    """Read the byte behind a guarded tensor."""
    tensor = at_the_end_of_a_page(torch.zeros(3))
    ctypes.string_at(tensor.data_ptr(), 4 * tensor.numel() + 1)


def run(call: str) -> subprocess.CompletedProcess[str]:
    code = f"from tests.kernels.test_reading_bounds import *; {call}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", PATHS)
def test_nothing_behind_a_matrix_is_read(path: str):
    done = run(f"multiply_all({path!r})")
    assert (done.returncode, done.stdout) == (0, "read nothing else\n"), done.stderr[-2000:]


def test_a_byte_behind_a_guarded_tensor_ends_the_process():
    assert run("read_one_more()").returncode == -signal.SIGSEGV
