"""Rounding for given rows: the definition it follows, and what it must never do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels.packed_weights import Int4Weight
from jamba_lm.quantization.error_feedback import BLOCK, DAMPING, quantize_int4_for
from jamba_lm.quantization.grid import quantize_int4


def correlated(rows: int, inputs: int, rank: int, draw: torch.Generator) -> Tensor:
    """Rows of a few directions and some noise, as activations are."""
    directions = torch.randn(rank, inputs, generator=draw)
    noise = torch.randn(rows, inputs, generator=draw)
    return torch.randn(rows, rank, generator=draw) @ directions + 0.3 * noise


def product_error(found: Int4Weight, weight: Tensor, rows: Tensor) -> float:
    difference = rows.double() @ (found.dequantize().double() - weight.double()).t()
    return float(difference.square().sum())


def one_input_after_the_other(weight: Tensor, rows: Tensor, group: int) -> Tensor:
    """The definition in float64: the inverse moments of what is left, made anew for each input."""
    grid = quantize_int4(weight, group)
    left = weight.double().clone()
    moments = rows.double().t() @ rows.double() / len(rows)
    order = moments.diagonal().argsort(descending=True, stable=True)
    moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    steps = torch.empty_like(left)
    for place, i in enumerate(order):
        after = order[place:]
        inverse = torch.linalg.inv(moments[after][:, after])
        scale = grid.scale_OJ[:, i // group].double()
        minimum = grid.minimum_OJ[:, i // group].double()
        steps[:, i] = ((left[:, i] - minimum) / scale).round().clamp(0, 15)
        error = left[:, i] - steps[:, i] * scale - minimum
        left[:, after] -= torch.outer(error / inverse[0, 0], inverse[0])
    return steps


@pytest.mark.parametrize("group", [32, 64])
def test_it_is_the_definition(group):
    draw = torch.Generator().manual_seed(group)
    inputs = 2 * BLOCK
    weight, rows = torch.randn(12, inputs, generator=draw), correlated(900, inputs, 20, draw)
    found = quantize_int4_for(weight, rows, group)
    expected = one_input_after_the_other(weight, rows, group)
    # A value halfway between two steps may fall to the other side in float32, and what follows
    # from it differs as well: seldom, and by a step.
    same = found.steps() == expected
    assert same.float().mean() > 0.99
    grid = quantize_int4(weight, group)
    steps = Int4Weight.on_grid(weight, grid.scale_OJ, grid.minimum_OJ).steps()
    assert (found.steps() == steps).float().mean() < 0.95
    assert torch.equal(found.scale_OJ, grid.scale_OJ)
    assert torch.equal(found.minimum_OJ, grid.minimum_OJ)


@pytest.mark.parametrize("rows", [8, 200, 2000])
def test_products_of_these_rows_are_nearer(rows):
    draw = torch.Generator().manual_seed(rows)
    weight, met = torch.randn(32, 192, generator=draw), correlated(rows, 192, 12, draw)
    found = product_error(quantize_int4_for(weight, met, 64), weight, met)
    assert found < 0.5 * product_error(quantize_int4(weight, 64), weight, met)


def test_products_of_other_rows_like_them_are_nearer():
    draw = torch.Generator().manual_seed(5)
    weight, rows = torch.randn(32, 192, generator=draw), correlated(4000, 192, 12, draw)
    met, other = rows[:2000], rows[2000:]
    found = product_error(quantize_int4_for(weight, met, 64), weight, other)
    assert found < 0.6 * product_error(quantize_int4(weight, 64), weight, other)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_as_without_rows():
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 96, generator=draw)
    for rows in (torch.diag(torch.rand(96, generator=draw) + 0.1), torch.zeros(4, 96)):
        found, plain = quantize_int4_for(weight, rows, 32), quantize_int4(weight, 32)
        assert torch.equal(found.packed, plain.packed)
    assert torch.equal(
        quantize_int4_for(weight, torch.empty(0, 96), 32).packed, quantize_int4(weight, 32).packed
    )


def test_inputs_that_are_never_used_are_rounded_as_without_rows():
    draw = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(9, 128, generator=draw), correlated(300, 128, 8, draw)
    unused = torch.arange(128) % 3 == 1
    rows[:, unused] = 0
    found, plain = quantize_int4_for(weight, rows, 64).steps(), quantize_int4(weight, 64).steps()
    assert torch.equal(found[:, unused], plain[:, unused])
    assert not torch.equal(found[:, ~unused], plain[:, ~unused])


@given(
    outputs=st.integers(1, 5),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64]),
    rows=st.integers(0, 70),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    rank=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_the_rows_are_the_weights_stay_on_their_grid(
    outputs, groups, group, rows, size, rank, dtype, seed
):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, groups * group, generator=draw).to(dtype)
    # Of few directions and without noise: moments that cannot be inverted as they are.
    met = torch.randn(rows, rank, generator=draw) @ torch.randn(
        rank, groups * group, generator=draw
    )
    found = quantize_int4_for(weight, (size * met).to(dtype), group)
    plain = quantize_int4(weight, group)
    assert torch.equal(found.scale_OJ, plain.scale_OJ)
    assert torch.equal(found.minimum_OJ, plain.minimum_OJ)
    assert found.shape == plain.shape
    # A unit of the rows that is a power of two changes nothing.
    again = quantize_int4_for(weight, met.to(dtype) * 0.25, group)
    if size == 1.0:
        assert torch.equal(found.packed, again.packed)


def test_a_group_of_equal_values_keeps_them():
    draw = torch.Generator().manual_seed(3)
    weight = torch.full((3, 64), 0.5)
    found = quantize_int4_for(weight, correlated(50, 64, 4, draw), 32)
    assert torch.equal(found.dequantize(), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_no_numbers_are_refused(value):
    rows = torch.randn(5, 64)
    rows[2, 3] = value
    with pytest.raises(ValueError, match="rows_TI holds NaN or infinity"):
        quantize_int4_for(torch.randn(3, 64), rows, 32)
