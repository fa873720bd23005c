"""The loss in pieces is the loss as a whole, and its gradient too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jamba_lm.data import IGNORED
from jamba_lm.training import loss
from tests.tolerances import TRAINING, assert_within


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pieces_give_the_loss_and_gradient_of_the_whole(monkeypatch, rows, dtype):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 8)
    monkeypatch.setattr(loss, "WEIGHT_ROWS", 16)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden_MD = torch.randn(rows, 16).to(kind).requires_grad_()
    weight_VD = torch.randn(40, 16).to(kind).requires_grad_()
    targets_M = torch.randint(0, 40, (rows,))
    targets_M[1::3] = IGNORED

    found = loss.summed_cross_entropy(hidden_MD, weight_VD, targets_M)
    (found * 0.5).backward()

    wide_MD = hidden_MD.detach().double().requires_grad_()
    wide_VD = weight_VD.detach().double().requires_grad_()
    expected = F.cross_entropy(
        wide_MD @ wide_VD.T, targets_M, ignore_index=IGNORED, reduction="sum"
    )
    (expected * 0.5).backward()
    assert_within(found, expected.float(), TRAINING[f"loss {dtype}"], "loss")
    for name, own, other in (("hidden", hidden_MD, wide_MD), ("weight", weight_VD, wide_VD)):
        assert own.grad.dtype == kind
        assert_within(own.grad, other.grad.float(), TRAINING[f"loss gradient {dtype}"], name)


def test_the_gradient_of_no_rows_is_zero():
    hidden_MD = torch.randn(0, 16, requires_grad=True)
    weight_VD = torch.randn(40, 16, requires_grad=True)
    loss.summed_cross_entropy(hidden_MD, weight_VD, torch.randint(0, 40, (0,))).backward()
    assert torch.equal(weight_VD.grad, torch.zeros(40, 16))


@pytest.mark.parametrize("rows", [8, 30])
def test_gradients_are_given_away_once(monkeypatch, rows):
    """They are scaled where they lie: who asks again gets an error, not a square of the scale."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 8)
    hidden_MD = torch.randn(rows, 16, requires_grad=True)
    weight_VD = torch.randn(40, 16, requires_grad=True)
    total = loss.summed_cross_entropy(hidden_MD, weight_VD, torch.randint(0, 40, (rows,)))
    total.backward(retain_graph=True)
    before = weight_VD.grad.clone()
    with pytest.raises(RuntimeError, match="given away by an earlier backward pass"):
        total.backward()
    assert torch.equal(weight_VD.grad, before)


def test_large_logits_do_not_overflow():
    hidden_MD = torch.full((2, 4), 100.0, requires_grad=True)
    weight_VD = torch.randn(5, 4) * 100
    total = loss.summed_cross_entropy(hidden_MD, weight_VD, torch.tensor([0, 1]))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(hidden_MD.grad).all()


def test_no_gradient_is_made_when_none_is_wanted():
    hidden_MD, weight_VD = torch.randn(3, 4), torch.randn(5, 4)
    total = loss.summed_cross_entropy(hidden_MD, weight_VD, torch.tensor([0, 1, IGNORED]))
    assert not total.requires_grad


@pytest.mark.parametrize("learned", [1, 3, 20])
def test_rows_that_predict_nothing_change_nothing(learned):
    """Where they are most of the rows, no logits are made for them; the gradient is the same."""
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(40, 8, generator=draw, requires_grad=True)
    weight = torch.randn(50, 8, generator=draw, requires_grad=True)
    targets = torch.full((40,), IGNORED)
    rows = torch.randperm(40, generator=draw)[:learned]
    targets[rows] = torch.randint(50, (learned,), generator=draw)
    loss.summed_cross_entropy(hidden, weight, targets).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum").backward()
    for one, expected in zip(found, (hidden.grad, weight.grad), strict=True):
        assert_within(one, expected, TRAINING["loss gradient fp32"])


def test_a_frozen_output_matrix_gets_no_gradient_and_changes_none():
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 8, generator=draw, requires_grad=True)
    weight = torch.randn(50, 8, generator=draw, requires_grad=True)
    targets = torch.randint(50, (6,), generator=draw)
    loss.summed_cross_entropy(hidden, weight, targets).backward()
    expected, hidden.grad = hidden.grad, None
    frozen = weight.detach()
    loss.summed_cross_entropy(hidden, frozen, targets).backward()
    assert torch.equal(hidden.grad, expected)
