"""The search of a grid in 4 bits: never worse than the plain range, and exact where it can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.kernels.packed_weights import Int4Weight
from jamba_lm.quantization import grid
from jamba_lm.quantization.grid import find_grids, quantize_int4


def by_range(weight: torch.Tensor, group: int) -> Int4Weight:
    grouped = weight.float().reshape(len(weight), -1, group)
    minimum, largest = grouped.amin(-1), grouped.amax(-1)
    return Int4Weight.on_grid(weight, ((largest - minimum) / 15).bfloat16(), minimum.bfloat16())


def errors(found: Int4Weight, weight: torch.Tensor) -> torch.Tensor:
    """Return the squared error of every group."""
    difference = found.dequantize().double() - weight.double()
    return difference.square().reshape(*found.scale_OJ.shape, -1).sum(-1)


@given(
    rows=st.integers(1, 4),
    group=st.sampled_from([32, 64]),
    groups=st.integers(1, 3),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    shift=st.sampled_from([0.0, 0.5, 100.0]),
    power=st.sampled_from([1, 3, 7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_group_is_worse_than_with_its_plain_range(rows, group, groups, size, shift, power, seed):
    draw = torch.Generator().manual_seed(seed)
    # Odd powers of normal values have ever heavier tails.
    weight = size * (torch.randn(rows, groups * group, generator=draw) ** power + shift)
    found, plain = (
        errors(quantize_int4(weight, group), weight),
        errors(by_range(weight, group), weight),
    )
    # The search adds up in float32.
    assert (found <= plain * (1 + 1e-3) + 1e-12 * weight.double().square().sum()).all()


@pytest.mark.parametrize(("group", "gain"), [(32, 0.92), (64, 0.95)])
def test_the_search_earns_its_time(group, gain):
    weight = torch.randn(64, 1024)
    found, plain = (
        errors(quantize_int4(weight, group), weight),
        errors(by_range(weight, group), weight),
    )
    assert float(found.sum() / plain.sum()) ** 0.5 < gain + 0.01


def test_values_on_a_grid_are_found_exactly():
    steps = torch.stack([torch.randperm(64) % 16 for _ in range(20)])
    weight = steps * 0.25 - 1.5
    assert torch.equal(quantize_int4(weight, 64).dequantize(), weight)


def test_equal_values_need_no_scale():
    weight = torch.full((2, 64), 0.5)
    found = quantize_int4(weight, 32)
    assert torch.equal(found.dequantize(), weight)
    assert torch.equal(quantize_int4(torch.zeros(1, 32), 32).dequantize(), torch.zeros(1, 32))


def test_groups_are_searched_on_their_own(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(9, 192).bfloat16()
    whole = find_grids(weight, 64)
    monkeypatch.setattr(grid, "VALUES_AT_ONCE", 4 * 64)
    for one, other in zip(whole, find_grids(weight, 64), strict=True):
        assert one.dtype is torch.bfloat16
        assert torch.equal(one, other)
    alone = find_grids(weight[3:4, 64:128], 64)
    assert torch.equal(alone[0][0], whole[0][3, 1:2])
