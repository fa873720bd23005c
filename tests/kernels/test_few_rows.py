"""Products of a few rows: every kind of matrix, every instruction set, any company of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_products import float_linear
from jamba_lm.kernels.native_structs import FEW_ROWS
from jamba_lm.kernels.packed_weights import Int4Weight, Int8Weight
from tests.kernels.matrices import KINDS, fits, matrix_of
from tests.kernels.thread_counts import same_bits_with_any_threads
from tests.tolerances import FEW_ROW_PRODUCTS, assert_within

PATHS = loaded_library().paths_here
# Outputs and inputs that fill whole tiles, with one tile along the inputs, an odd number of them,
# more groups of INT4 than are unpacked at once; and some that fill none.
SHAPES = [(32, 64), (64, 192), (160, 320), (32, 4160), (48, 64), (36, 128), (33, 192), (96, 96)]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9, FEW_ROWS])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in SHAPES if fits(kind, shape[1])],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_a_few_rows_meet_the_matrix(path, kind, shape, rows):
    outputs, inputs = shape
    weight, bias = KINDS[kind](torch.randn(outputs, inputs)), torch.randn(outputs)
    x = torch.randn(rows, inputs) * torch.logspace(-2, 2, rows)[:, None]
    for added in (None, bias):
        expected = x.double() @ matrix_of(weight).t()
        # A sum near zero is as exact as its terms are large.
        terms = x.double().abs() @ matrix_of(weight).abs().t()
        if added is not None:
            expected, terms = expected + added, terms + added.abs()
        error = (float_linear(x, weight, added, path=path).double() - expected).abs()
        assert (error <= FEW_ROW_PRODUCTS[kind.split()[0]] * terms).all()


@settings(max_examples=80, deadline=None)
@given(
    path=st.sampled_from(PATHS),
    kind=st.sampled_from(list(KINDS)),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    count=st.integers(1, FEW_ROWS),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_has_the_same_bits_in_any_company(path, kind, outputs, inputs, count, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = KINDS[kind](torch.randn(32 * outputs, 64 * inputs, generator=draw))
    x = torch.randn(FEW_ROWS, 64 * inputs, generator=draw)
    together = float_linear(x, weight, path=path)
    for first in range(0, FEW_ROWS - count + 1, count):
        alone = float_linear(x[first : first + count], weight, path=path)
        assert torch.equal(alone, together[first : first + count])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_threads_changes_no_bit(path, kind):
    weight, x = KINDS[kind](torch.randn(960, 512)), torch.randn(11, 512)
    assert same_bits_with_any_threads(lambda: float_linear(x, weight, path=path))


@pytest.mark.parametrize("inputs", [64, 192, 4160])
@pytest.mark.parametrize("path", PATHS)
def test_integers_are_multiplied_exactly_by_whole_tiles(path, inputs):
    # The largest input is what the kernels round to 32639, so that the others round to themselves;
    # the rest reach every pair of bytes.
    x = torch.randint(-3000, 3000, (13, inputs)).float()
    x[:, 5] = 32639.0
    x[1::2, 5] = -32639.0
    one = torch.ones(64, inputs // 32, dtype=torch.bfloat16)
    packed = torch.randint(256, (64, inputs // 2), dtype=torch.uint8)
    for weight in (
        Int8Weight(torch.randint(-1, 2, (64, inputs), dtype=torch.int8), torch.ones(64)),
        Int4Weight(packed & 0x11, one, -one),
        Int4Weight(packed & 0x11, one[:, ::2].contiguous(), -one[:, ::2].contiguous()),
    ):
        found = float_linear(x, weight, path=path)
        assert torch.equal(found.double(), x.double() @ matrix_of(weight).t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path, kind):
    weight = KINDS[kind](torch.rand(64, 128) + 0.5)
    x = torch.randn(9, 128)
    clean = float_linear(x, weight, path=path)
    x[2, 5], x[4, 100], x[8, 1] = torch.inf, torch.nan, -torch.inf
    found = float_linear(x, weight, path=path)
    for row in (2, 4, 8):
        assert not found[row].isfinite().any()
    if kind in ("fp32", "bf16"):
        # Weights are positive; integers have no infinity.
        assert (found[2] == torch.inf).all()
        assert (found[8] == -torch.inf).all()
    kept = [row for row in range(9) if row not in (2, 4, 8)]
    assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e-34, 1e-20, 1e20, 3e38])
def test_rows_of_very_small_and_very_large_values(size, path, kind):
    weight = KINDS[kind](0.01 * torch.rand(32, 64))
    x = size * (0.5 + 0.5 * torch.rand(3, 64))
    expected = x.double() @ matrix_of(weight).t()
    assert_within(float_linear(x, weight, path=path), expected, 1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_parts_of_a_row_are_rounded_to_the_nearest(path):
    # Sums of four thousand terms of one sign: rounding errors cancel, what is cut off does not.
    x = 1.0 + torch.rand(3, 4096)
    found = float_linear(x, torch.ones(32, 4096).to(torch.bfloat16), path=path)
    expected = x.double().sum(-1, keepdim=True)
    assert ((found.double() / expected - 1).abs() < 1e-6).all()
