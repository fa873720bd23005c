"""What every back-end owes for products with packed matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels import native_products, ops
from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.packed_weights import Int4Weight, Int8Weight, PackedWeight
from tests.kernels.matrices import PACKED as KINDS
from tests.tolerances import PACKED_LINEAR, assert_within

BACKENDS = ["reference", "native"]
PATHS = loaded_library().paths_here
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rows, outputs, inputs: one row, a few, one more than few, many; outputs that fill no vector; more
# groups than a kernel unpacks at once. Then inputs that fill no step of a kernel.
SHAPES = [
    (1, 1, 64),
    (1, 48, 128),
    (3, 17, 192),
    (8, 33, 64),
    (16, 5, 2048),
    (17, 5, 64),
    (2, 6, 4160),
    (70, 96, 256),
    (1, 9, 32),
    (3, 17, 224),
    (20, 33, 4128),
]
# What the inputs of a matrix must be a multiple of.
MULTIPLE = {"int8": 1, "int4 by 32": 32, "int4 by 64": 64}


def tolerance(backend: str, dtype: str) -> float:
    return PACKED_LINEAR[f"native {dtype}" if backend == "native" else dtype]


def defined(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply in float64 with the matrix that the weight stands for, written out."""
    if isinstance(weight, Int8Weight):
        matrix = weight.values_OI.double() * weight.scale_O.double()[:, None]
    else:
        outputs, inputs = weight.shape
        matrix = torch.empty(outputs, inputs, dtype=torch.float64)
        for i in range(inputs):
            run, place = divmod(i, 32)
            byte = weight.packed[:, 16 * run + place % 16]
            q = (byte >> 4 if place >= 16 else byte & 15).double()
            group = i // weight.group
            matrix[:, i] = q * weight.scale_OJ[:, group].double()
            matrix[:, i] += weight.minimum_OJ[:, group].double()
    y = x.double() @ matrix.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in SHAPES if shape[2] % MULTIPLE[kind] == 0],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_product_is_that_of_the_matrix_it_stands_for(backend, kind, shape, dtype):
    rows, outputs, inputs = shape
    weight = KINDS[kind](torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs).to(DTYPES[dtype])
    for bias in (None, torch.randn(outputs).to(DTYPES[dtype])):
        y = ops.packed_linear(x, weight, bias, backend=backend)
        assert y.dtype == x.dtype
        assert_within(y, defined(x, weight, bias), tolerance(backend, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 40),
    runs=st.integers(1, 6),
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(list(DTYPES)),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_gives_the_product(backend, rows, outputs, runs, kind, dtype, size, seed):
    draw = torch.Generator().manual_seed(seed)
    inputs = runs * max(8, MULTIPLE[kind])
    weight = KINDS[kind](size * torch.randn(outputs, inputs, generator=draw))
    x = torch.randn(rows, inputs, generator=draw).to(DTYPES[dtype])
    y = ops.packed_linear(x, weight, backend=backend)
    assert y.shape == (rows, outputs)
    if rows:
        expected = defined(x, weight, None)
        # A sum near zero is as exact as its terms are large.
        terms = x.double().abs() @ defined(torch.eye(inputs), weight, None).abs()
        error = (y.double() - expected).abs()
        per_term = tolerance(backend, dtype if backend == "native" else "fp32")
        allowed = per_term * terms + tolerance(backend, dtype) * expected.abs()
        assert (error <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_has_the_same_product_alone_and_among_others(backend, kind):
    weight = KINDS[kind](torch.randn(40, 256))
    x = torch.randn(33, 256)
    together = ops.packed_linear(x, weight, backend=backend)
    for rows in (slice(0, 1), slice(5, 9), slice(16, 33)):
        alone = ops.packed_linear(x[rows], weight, backend=backend)
        assert_within(alone, together[rows], tolerance(backend, "fp32"))


@pytest.mark.parametrize("path", PATHS)
def test_sums_of_the_largest_integers_do_not_overflow(path):
    inputs = 1 << 15
    weight = Int8Weight.quantize(torch.ones(5, inputs))
    y = native_products.packed_linear(torch.ones(3, inputs), weight, path=path)
    assert_within(y, torch.full((3, 5), float(inputs)), PACKED_LINEAR["fp32"])


@pytest.mark.parametrize(("inputs", "group"), [(192, 64), (192, 32), (224, 32), (4128, 32)])
@pytest.mark.parametrize("path", PATHS)
def test_integers_are_multiplied_exactly(path, inputs, group):
    # The largest input is what the kernel rounds to 32639, so that the others round to themselves.
    x = torch.randint(-200, 200, (3, inputs)).float()
    x[:, 5] = torch.tensor([32639.0, -32639.0, 32639.0])
    eight = Int8Weight(torch.randint(-3, 4, (9, inputs), dtype=torch.int8), torch.ones(9))
    packed = torch.randint(256, (9, inputs // 2), dtype=torch.uint8)
    one = torch.ones(9, inputs // group, dtype=torch.bfloat16)
    for weight in (eight, Int4Weight(packed, one, -8 * one), Int4Weight(packed, 2 * one, one)):
        found = native_products.packed_linear(x, weight, path=path)
        assert torch.equal(found.double(), defined(x, weight, None))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-34, 1e-30, 1e30])
@pytest.mark.parametrize("path", PATHS)
def test_rows_of_very_small_or_large_values_do_not_overflow(path, size):
    weight = Int8Weight.quantize(torch.randn(9, 64))
    x = size * torch.randn(3, 64)
    found = native_products.packed_linear(x, weight, path=path)
    expected = defined(x, weight, None)
    # Below 2^-100 a row may count as zero.
    allowed = PACKED_LINEAR["native fp32"] * expected.abs().max() + 2.0**-96
    assert (found - expected).abs().max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_threads_changes_no_bit(path, kind):
    weight, x = KINDS[kind](torch.randn(1003, 512)), torch.randn(5, 512)
    before = torch.get_num_threads()
    found = []
    try:
        # More than once each: threads that share what they should not meet by chance.
        for threads in (1, 2, 3, 2, 3, 2, 3):
            torch.set_num_threads(threads)
            found.append(native_products.packed_linear(x, weight, path=path))
            found.append(native_products.unpack(weight, torch.float32, path=path))
    finally:
        torch.set_num_threads(before)
    assert_within(found[0], defined(x, weight, None), PACKED_LINEAR["native fp32"])
    for y, matrix in zip(found[2::2], found[3::2], strict=True):
        assert torch.equal(y, found[0])
        assert torch.equal(matrix, weight.dequantize())


@pytest.mark.parametrize("inputs", [1, 7, 33, 100, 8200])
@pytest.mark.parametrize("path", PATHS)
def test_rows_in_eight_bits_may_have_any_length(path, inputs):
    weight, x = Int8Weight.quantize(torch.randn(9, inputs)), torch.randn(3, inputs)
    y = native_products.packed_linear(x, weight, path=path)
    assert_within(y, defined(x, weight, None), PACKED_LINEAR["native fp32"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set_gives_the_product_and_the_matrix(path, kind):
    weight, x = KINDS[kind](torch.randn(70, 4160)), torch.randn(7, 4160)
    y = native_products.packed_linear(x, weight, path=path)
    assert_within(y, defined(x, weight, None), PACKED_LINEAR["native fp32"])
    assert torch.equal(
        native_products.unpack(weight, torch.float32, path=path), weight.dequantize()
    )
    alone = native_products.packed_linear(x[3:4], weight, path=path)
    assert torch.equal(alone, y[3:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_lie(backend, kind):
    weight = KINDS[kind](torch.randn(10, 64))
    holder = torch.randn(6, 3, 64)
    for x in (holder[:, 1], torch.randn(64, 6).t()):
        before = x.clone()
        expected = ops.packed_linear(x.contiguous(), weight, backend=backend)
        assert_within(ops.packed_linear(x, weight, backend=backend), expected, 1e-6)
        assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_passes_through_to_the_inputs(kind):
    weight = KINDS[kind](torch.randn(12, 64))
    x = torch.randn(3, 64, requires_grad=True)
    ops.packed_linear(x, weight).sum().backward()
    expected = weight.dequantize().sum(0).expand(3, -1)
    assert_within(x.grad, expected, PACKED_LINEAR["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_only_the_bias_needs_is_not_lost(backend):
    weight, bias = Int8Weight.quantize(torch.randn(12, 64)), torch.zeros(12, requires_grad=True)
    ops.packed_linear(torch.randn(3, 64), weight, bias, backend=backend).sum().backward()
    assert torch.equal(bias.grad, torch.full((12,), 3.0))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 32), None, "x_MI has shape \\(2, 32\\), expected \\(2, 64\\)"),
        (torch.zeros(64), None, "x_MI has shape"),
        (torch.zeros(2, 64), torch.zeros(4), "bias_O has shape \\(4,\\), expected \\(3,\\)"),
        (torch.zeros(2, 64, device="meta"), None, "the weight is on cpu, the input on meta"),
    ],
)
def test_wrong_shapes_and_places_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=message):
        ops.packed_linear(x, Int8Weight.quantize(torch.randn(3, 64)), bias)


def test_four_bits_come_in_two_classes_of_groups():
    assert {KINDS[kind](torch.randn(2, 64)).group for kind in KINDS if "4" in kind} == {32, 64}
    assert isinstance(KINDS["int4 by 64"](torch.randn(2, 64)), Int4Weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_not_hidden(wrong, path, kind):
    weight, x = KINDS[kind](torch.randn(9, 128)), torch.randn(3, 128)
    for place in (0, 77):
        x[1, place] = wrong
        y = native_products.packed_linear(x, weight, path=path)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()
