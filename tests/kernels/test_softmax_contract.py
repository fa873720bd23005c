"""What every back-end owes for the softmax of a loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.kernels import native_softmax, ops, reference
from jamba_lm.kernels.library import loaded_library
from tests.kernels.thread_counts import same_bits_with_any_threads
from tests.tolerances import ROW_OPS, assert_within

RUNNERS = ["reference", *loaded_library().paths_here]
SHAPES = [(1, 1), (1, 16), (3, 5), (2, 33), (40, 64), (7, 1000), (65, 777)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sums(runner: str, scores: Tensor) -> tuple[Tensor, Tensor]:
    if runner == "reference":
        return reference.softmax_sums(scores)
    return native_softmax.softmax_sums(scores, path=runner)


def slopes(runner: str, scores: Tensor, *rest: Tensor) -> Tensor:
    if runner == "reference":
        return reference.softmax_slopes_(scores, *rest)
    return native_softmax.softmax_slopes_(scores, *rest, path=runner)


def scores_of(shape: tuple[int, int], dtype: str) -> Tensor:
    return (4.0 * torch.randn(shape)).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_sums_are_those_of_float64(runner: str, shape: tuple[int, int], dtype: str):
    scores = scores_of(shape, dtype)
    largest, total = sums(runner, scores)
    assert largest.dtype == total.dtype == torch.float32
    assert torch.equal(largest, scores.float().amax(-1))
    wide = scores.double()
    expected = (wide.logsumexp(-1) - wide.amax(-1)).exp()
    # Of scores as they are, so without the rounding of bfloat16.
    assert_within(total, expected, ROW_OPS["fp32"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_slopes_are_those_of_the_cross_entropy(runner: str, shape: tuple[int, int], dtype: str):
    rows, width = shape
    scores = scores_of(shape, dtype)
    targets = torch.randint(width, (rows,))
    wide = scores.double().requires_grad_()
    F.cross_entropy(wide, targets, reduction="sum").backward()
    largest, total = sums(runner, scores)
    found = slopes(runner, scores, largest, 1.0 / total, targets)
    assert found is scores
    assert_within(found, wide.grad, ROW_OPS[dtype])


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sure_row_keeps_the_digits_of_what_is_left(runner: str):
    """One is taken from the probability of the target before that is rounded to bfloat16."""
    scores = torch.zeros(1, 20, dtype=torch.bfloat16)
    scores[0, 3] = 8.0
    largest, total = sums(runner, scores)
    slopes(runner, scores, largest, 1.0 / total, torch.tensor([3]))
    expected = 1.0 / (1.0 + 19.0 * math.exp(-8.0)) - 1.0
    assert scores[0, 3].item() == pytest.approx(expected, rel=8e-3)


@pytest.mark.parametrize("target", [-100, -1, 9, 50])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_target_that_is_not_here_takes_nothing_away(runner: str, target: int):
    scores = scores_of((2, 9), "fp32")
    expected = scores.softmax(-1)
    expected[1, 4] -= 1.0
    largest, total = sums(runner, scores)
    slopes(runner, scores, largest, 1.0 / total, torch.tensor([target, 4]))
    assert_within(scores, expected, ROW_OPS["fp32"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_parts_of_a_vocabulary_make_the_whole(runner: str):
    """With the largest score of all parts, and sums brought to it, each part's slopes fit."""
    scores, target = scores_of((6, 50), "fp32"), torch.tensor([0, 19, 20, 21, 49, -100])
    whole = scores.clone()
    share = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    largest, total = sums(runner, whole)
    slopes(runner, whole, largest, share / total, target)
    parts = [(first, scores[:, first:end].clone()) for first, end in ((0, 20), (20, 50))]
    found = [sums(runner, part) for _, part in parts]
    top = torch.stack([part_largest for part_largest, _ in found]).amax(0)
    added = sum(part_total * (part_largest - top).exp() for part_largest, part_total in found)
    for first, part in parts:
        slopes(runner, part, top, share / added, target - first)
    assert_within(torch.cat([part for _, part in parts], 1), whole, ROW_OPS["fp32"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_may_lie_apart(runner: str):
    wide = scores_of((5, 40), "bf16")
    untouched = wide[:, 21:].clone()
    part, alone = wide[:, 3:21], wide[:, 3:21].clone()
    assert part.stride(0) == 40
    targets = torch.arange(5)
    for scores in (part, alone):
        largest, total = sums(runner, scores)
        slopes(runner, scores, largest, 1.0 / total, targets)
    assert torch.equal(part, alone)
    assert torch.equal(wide[:, 21:], untouched)


@pytest.mark.parametrize("runner", RUNNERS)
def test_not_a_number_is_seen_in_the_sum(runner: str):
    scores = scores_of((3, 37), "fp32")
    scores[1, 5], scores[2, 36] = float("nan"), float("nan")
    _, total = sums(runner, scores)
    assert total.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("runner", RUNNERS)
def test_large_scores_do_not_overflow(runner: str):
    scores = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    largest, total = sums(runner, scores)
    assert total.tolist() == pytest.approx([1.0, 3.0])
    slopes(runner, scores, largest, 1.0 / total, torch.tensor([0, 1]))
    assert_within(scores, torch.tensor([[0.0, 0.0, 0.0], [1 / 3, -2 / 3, 1 / 3]]), ROW_OPS["fp32"])


@pytest.mark.parametrize("runner", RUNNERS[1:])
def test_threads_change_no_bit(runner: str):
    scores, targets = scores_of((64, 1024), "bf16"), torch.randint(1024, (64,))

    def everything() -> Tensor:
        own = scores.clone()
        largest, total = sums(runner, own)
        slopes(runner, own, largest, 1.0 / total, targets)
        return torch.cat([largest[:, None], total[:, None], own.float()], 1)

    assert same_bits_with_any_threads(everything)


def test_no_rows_are_no_work():
    scores = torch.empty(0, 5)
    largest, total = ops.softmax_sums(scores)
    assert largest.shape == total.shape == (0,)
    nothing = torch.empty(0, dtype=torch.int64)
    assert ops.softmax_slopes_(scores, largest, total, nothing).shape == (0, 5)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(4, 3).t()])
def test_scores_of_another_form_are_refused(scores: Tensor):
    with pytest.raises(ValueError, match=r"softmax_sums: the scores are of shape"):
        ops.softmax_sums(scores)


def test_rows_that_do_not_fit_are_refused():
    scores, one = torch.zeros(2, 3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"share_M has shape \(1,\)"):
        ops.softmax_slopes_(scores, torch.zeros(2), one, torch.tensor([0, 1]))
