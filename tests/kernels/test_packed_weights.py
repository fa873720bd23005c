"""The layouts of packed weights: what the bytes mean, what rounding loses, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.kernels import packed_weights
from jamba_lm.kernels.packed_weights import Int4Weight, Int8Weight, pack, row_blocks

SCALES = [1e-20, 1e-3, 1.0, 1e4, 1e20]


def min_max(weight: torch.Tensor, group: int) -> Int4Weight:
    """Round to the grid from the smallest to the largest value of each group."""
    grouped = weight.float().reshape(len(weight), -1, group)
    minimum = grouped.amin(-1).bfloat16()
    scale = ((grouped.amax(-1) - minimum.float()) / 15).bfloat16()
    return Int4Weight.on_grid(weight, scale, minimum)


def test_eight_bits_are_values_times_the_scale_of_their_row():
    weight = Int8Weight(
        torch.tensor([[1, -127], [100, 0]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    )
    assert weight.dequantize().tolist() == [[0.5, -63.5], [200.0, 0.0]]
    assert weight.shape == (2, 2)


def test_four_bits_lie_16_inputs_apart_in_a_byte():
    packed = torch.zeros(1, 32, dtype=torch.uint8)
    packed[0, 0], packed[0, 15], packed[0, 16] = 0x21, 0x43, 0x65
    scale = torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16)
    minimum = torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16)
    weight = Int4Weight(packed, scale, minimum)
    steps = weight.steps()[0].tolist()
    assert {i: q for i, q in enumerate(steps) if q} == {0: 1, 16: 2, 15: 3, 31: 4, 32: 5, 48: 6}
    row = weight.dequantize()[0]
    assert row[0] == 1 * 0.5 - 1.0
    assert row[31] == 4 * 0.5 - 1.0
    assert row[48] == 6 * 1.0 + 2.0
    assert (weight.shape, weight.group) == ((1, 64), 32)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_what_is_packed_can_be_unpacked(rows, runs, seed):
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(16, (rows, 32 * runs), generator=draw, dtype=torch.uint8)
    one = torch.ones(rows, runs, dtype=torch.bfloat16)
    assert torch.equal(Int4Weight(pack(steps), one, 0 * one).steps(), steps)


@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from(SCALES), st.integers(0, 2**32 - 1))
def test_eight_bits_are_off_by_half_a_step_at_most(rows, columns, size, seed):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = Int8Weight.quantize(weight)
    error = (found.dequantize().double() - weight.double()).abs()
    assert (error <= 0.5001 * found.scale_O.double()[:, None]).all()
    # The largest value of every row is used, and the scale is as small as it can be.
    assert (found.values_OI.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("size", SCALES)
def test_four_bits_are_off_by_half_a_step_within_their_range(group, size):
    weight = size * torch.randn(7, 128)
    found = min_max(weight, group)
    assert found.group == group
    error = (found.dequantize().double() - weight.double()).abs().reshape(7, -1, group)
    # A little more at the ends, which are rounded to bfloat16.
    assert (error <= 0.56 * found.scale_OJ.double()[..., None]).all()


def test_equal_values_and_zeros_survive():
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    for found in (Int8Weight.quantize(weight), min_max(weight, 64)):
        assert torch.allclose(found.dequantize(), weight, rtol=1e-6)


def test_the_smallest_numbers_do_not_overflow_their_integers():
    weight = torch.full((2, 4), 1e-44)
    assert Int8Weight.quantize(weight).values_OI.abs().max() <= 127


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(50, 64)
    whole = Int8Weight.quantize(weight), min_max(weight, 32)
    monkeypatch.setattr(packed_weights, "VALUES_AT_ONCE", 7 * 64)
    parts = Int8Weight.quantize(weight), min_max(weight, 32)
    for one, other in zip(whole, parts, strict=True):
        for left, right in zip(one.tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(left, right)
    assert row_blocks(50, 64)[-1] == (49, 50)
    assert row_blocks(3, 10**9) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("make", [Int8Weight.quantize, lambda w: min_max(w, 32)])
def test_rows_can_be_cut_out_and_picked(make):
    weight = make(torch.randn(9, 64))
    whole = weight.dequantize()
    assert torch.equal(weight.rows(2, 5).dequantize(), whole[2:5])
    assert torch.equal(weight.take(torch.tensor([8, 0, 0])).dequantize(), whole[[8, 0, 0]])
    assert weight.to(weight.device) is weight


EIGHT = Int8Weight(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4))
FOUR = Int4Weight(
    torch.zeros(4, 32, dtype=torch.uint8),
    torch.ones(4, 2, dtype=torch.bfloat16),
    torch.ones(4, 2, dtype=torch.bfloat16),
)


@pytest.mark.parametrize(
    ("weight", "changes", "message"),
    [
        (EIGHT, {"values_OI": EIGHT.values_OI.float()}, "values_OI is contiguous torch.float32"),
        (EIGHT, {"values_OI": EIGHT.values_OI[0]}, "of shape \\(64,\\): expected .* 2 axes"),
        (EIGHT, {"values_OI": EIGHT.values_OI.t()}, "values_OI is strided"),
        (EIGHT, {"scale_O": torch.ones(5)}, "scale_O has shape \\(5,\\): expected \\(4,\\)"),
        (EIGHT, {"scale_O": torch.ones(4).double()}, "scale_O is contiguous torch.float64"),
        (EIGHT, {"scale_O": torch.ones(4, device="meta")}, "are on \\['cpu', 'meta'\\]"),
        (FOUR, {"packed": FOUR.packed.to(torch.int8)}, "packed is contiguous torch.int8"),
        (FOUR, {"packed": FOUR.packed[:, :24].contiguous()}, "4 rows of 48 inputs, expected one"),
        (FOUR, {"packed": FOUR.packed[:3]}, "for 3 rows"),
        (FOUR, {"scale_OJ": FOUR.scale_OJ.float()}, "scale_OJ is contiguous torch.float32"),
        (FOUR, {"minimum_OJ": FOUR.minimum_OJ[:, :1].contiguous()}, "minimum_OJ has shape"),
        (FOUR, {"minimum_OJ": FOUR.minimum_OJ.half()}, "minimum_OJ is contiguous torch.float16"),
    ],
)
def test_what_a_kernel_could_not_read_is_refused(weight, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(weight, **changes)
