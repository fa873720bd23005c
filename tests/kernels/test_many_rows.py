"""Products of many rows, in tiles: every kind of matrix, every instruction set, any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_products import float_linear
from jamba_lm.kernels.native_structs import FEW_ROWS, RowRounding
from jamba_lm.kernels.packed_weights import Int8Weight
from tests.kernels.matrices import KINDS, PACKED, matrix_of
from tests.kernels.thread_counts import same_bits_with_any_threads
from tests.tolerances import MANY_ROWS, assert_within

PATHS = loaded_library().paths_here
# Rows, outputs, inputs: less than a tile, a bit more than one, more than a part of each, more
# groups than a kernel unpacks at once.
SHAPES = [
    (17, 1, 64),
    (18, 33, 192),
    (64, 16, 64),
    (18, 33, 224),
    (50, 300, 640),
    (530, 40, 1088),
    (18, 20, 4416),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(k, shape) for k in KINDS for shape in SHAPES if k != "int4 by 64" or shape[2] % 64 == 0],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_many_rows_meet_the_matrix(path, kind, shape, dtype):
    rows, outputs, inputs = shape
    weight = KINDS[kind](torch.randn(outputs, inputs))
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs)
    for added in (None, bias):
        y = float_linear(x, weight, added, path=path)
        assert y.dtype == dtype
        expected = x.double() @ matrix_of(weight).t()
        expected = expected if added is None else expected + added
        # Four bits become bfloat16 numbers where such are multiplied.
        rounded = dtype is torch.bfloat16 and (kind.startswith("int4") or kind == "fp32")
        assert_within(y, expected, MANY_ROWS["rounded" if rounded else str(dtype)])


@settings(max_examples=60)
@given(
    rows=st.integers(FEW_ROWS + 1, 80),
    outputs=st.integers(1, 80),
    inputs=st.integers(1, 200),
    kind=st.sampled_from(["fp32", "bf16", "int8"]),
    half=st.booleans(),
    path=st.sampled_from(PATHS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size_is_multiplied(rows, outputs, inputs, kind, half, path, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = KINDS[kind](torch.randn(outputs, inputs, generator=draw))
    x = torch.randn(rows, inputs, generator=draw).to(torch.bfloat16 if half else torch.float32)
    expected = x.double() @ matrix_of(weight).t()
    # What lies around the rows and the matrix belongs to others.
    holder = torch.full((rows, inputs + 7), torch.nan, dtype=x.dtype)
    holder[:, :inputs] = x
    found = float_linear(holder[:, :inputs], weight, path=path)
    assert_within(found, expected, MANY_ROWS[str(x.dtype)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_row_has_the_same_product_in_any_company(path, kind):
    weight = KINDS[kind](torch.randn(70, 320))
    x = torch.randn(600, 320).to(torch.bfloat16)
    together = float_linear(x, weight, path=path)
    for rows in (slice(0, 17), slice(5, 90), slice(511, 600)):
        assert torch.equal(float_linear(x[rows], weight, path=path), together[rows])


@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_threads_changes_no_bit(path):
    weight, x = torch.randn(900, 512), torch.randn(100, 512)
    assert same_bits_with_any_threads(lambda: float_linear(x, weight, path=path))


GROUP = 64
# Instruction sets that multiply bytes: with a scale for each row, or for each group of its inputs.
BY_ROW = [path for path in PATHS if path == "amx"]
BY_GROUP = [path for path in PATHS if path in ("avx512_bf16", "avx512_vnni")]


def rounded_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits as the kernels do: halves away from zero, the largest becomes 127.

    Returns:
        What they are then, [M, J, group], zero past the last input, and what 1 stands for,
        [M, J, 1].
    """
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).view(len(x), -1, group)
    largest = wide.abs().amax(-1, keepdim=True)
    # Not 127.0 / largest, which torch takes as 127 times the rounded reciprocal.
    scaled = wide * torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return torch.trunc(scaled + torch.where(scaled < 0, -0.5, 0.5)), largest / 127.0


@pytest.mark.parametrize("shape", [(17, 5, 64), (40, 33, 100), (530, 300, 1100)], ids=str)
@pytest.mark.parametrize(
    ("path", "kind"),
    [(path, "int8") for path in BY_ROW] + [(path, kind) for path in BY_GROUP for kind in PACKED],
)
def test_rows_in_eight_bits_are_multiplied_exactly(path, kind, shape):
    rows, outputs, inputs = shape
    if kind != "int8":
        inputs += -inputs % (GROUP if kind == "int4 by 64" else GROUP // 2)
    weight = KINDS[kind](torch.randn(outputs, inputs))
    x = (torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]).to(torch.bfloat16)
    x[:, :20] *= 50
    x[3] = 0
    x[4, 64:] = 0
    bias = torch.randn(outputs)
    allowed = RowRounding.BY_ROW if path in BY_ROW else RowRounding.BY_GROUP
    values, unit = rounded_rows(x, inputs if path in BY_ROW else GROUP)
    near = (values.double() * unit).flatten(1)[:, :inputs]
    matrix = matrix_of(weight).double()
    found = float_linear(x, weight, bias, rows8=allowed, path=path)
    if path in BY_GROUP:
        assert torch.equal(found, float_linear(x, weight, bias, rows8=allowed, path=BY_GROUP[0]))
    expected = near @ matrix.t() + bias
    error = (found.double() - expected).abs()
    # That of the result's type, and that of float32 sums of groups, whose least and largest values
    # are added apart. With one scale for a row all is exact.
    least = weight.minimum_OJ.double().repeat_interleave(weight.group, 1) if "int4" in kind else 0
    parts = near.abs() @ ((matrix - least).abs() + abs(least)).t() + bias.abs()
    inexact = 1e-6 if path in BY_ROW else 1e-6 * parts
    assert (error <= MANY_ROWS["torch.bfloat16"] * expected.abs() + inexact).all()
    # Rows in 16 bits would be found out.
    kept = float_linear(x, weight, bias, path=path)
    assert not torch.equal(found, kept)


@pytest.mark.parametrize("path", PATHS)
def test_rows_in_eight_bits_are_only_taken_where_that_was_allowed(path):
    x = torch.randn(40, 256)
    for kind in ("int8", "int4 by 64"):
        weight = KINDS[kind](torch.randn(64, 256))
        # Rows of float32 are asked to stay what they are.
        plain = float_linear(x, weight, path=path)
        for allowed in RowRounding:
            assert torch.equal(float_linear(x, weight, rows8=allowed, path=path), plain)
        half = x.to(torch.bfloat16)
        by = {
            allowed: float_linear(half, weight, rows8=allowed, path=path) for allowed in RowRounding
        }
        rounded = MANY_ROWS["rounded" if kind != "int8" else str(half.dtype)]
        assert_within(by[RowRounding.NONE], half.double() @ matrix_of(weight).t(), rounded)
        changed = {
            allowed for allowed in RowRounding if not torch.equal(by[allowed], by[RowRounding.NONE])
        }
        if path in BY_GROUP:
            assert changed == {RowRounding.BY_GROUP, RowRounding.BY_ROW}
            assert torch.equal(by[RowRounding.BY_GROUP], by[RowRounding.BY_ROW])
        else:
            assert changed == ({RowRounding.BY_ROW} if path in BY_ROW and kind == "int8" else set())


@pytest.mark.parametrize("kind", ["int8", "int4 by 32"])
@pytest.mark.parametrize("path", BY_ROW + BY_GROUP)
def test_a_row_in_eight_bits_that_is_not_finite_is_not_hidden(path, kind):
    weight = KINDS[kind](torch.randn(20, 128))
    x = torch.randn(20, 128).to(torch.bfloat16)
    x[2, 5], x[7, 100] = float("inf"), float("nan")
    found = float_linear(x, weight, rows8=RowRounding.BY_ROW, path=path)
    assert found[[2, 7]].isnan().all()
    found[[2, 7]] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sums_of_integers_do_not_overflow(path):
    inputs = 1 << 16
    weight = Int8Weight.quantize(torch.ones(3, inputs))
    for sign in (1, -1):
        x = torch.full((20, inputs), float(sign)).to(torch.bfloat16)
        found = float_linear(x, weight, rows8=RowRounding.BY_ROW, path=path)
        assert_within(found, torch.full((20, 3), float(sign * inputs)), MANY_ROWS["torch.bfloat16"])


@pytest.mark.parametrize("rounding", RowRounding)
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("path", PATHS)
def test_a_rounded_row_has_the_same_product_in_any_company(path, kind, rounding):
    weight = KINDS[kind](torch.randn(70, 320))
    x = torch.randn(600, 320).to(torch.bfloat16)
    together = float_linear(x, weight, rows8=rounding, path=path)
    for rows in (slice(0, 17), slice(5, 90), slice(511, 600)):
        assert torch.equal(float_linear(x[rows], weight, rows8=rounding, path=path), together[rows])
