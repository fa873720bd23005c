"""What a finished decoder is given before FSDP cuts it changes no number."""

from __future__ import annotations

import copy

import torch

from jamba_lm.model.batch import Batch
from jamba_lm.model.moe import MoE
from jamba_lm.training.sharding import touch_idle_experts
from tests.training.test_optimizer import tiny_decoder


def gradients(decoder, rows: int) -> dict[str, torch.Tensor | None]:
    decoder(torch.arange(rows), Batch.of([rows])).square().sum().backward()
    return {name: weight.grad for name, weight in decoder.named_parameters()}


def test_an_expert_without_rows_gets_a_gradient_of_zero_and_the_others_keep_theirs():
    decoder = tiny_decoder().float()
    touched = copy.deepcopy(decoder)
    touch_idle_experts(touched)
    # One row goes to two of the experts of each mixture, and to the same ones the second time.
    expected, found = gradients(decoder, 1), gradients(touched, 1)
    idle = [name for name, gradient in expected.items() if gradient is None]
    mixtures = [block for block in decoder.blocks if isinstance(block.feed_forward, MoE)]
    assert len(idle) >= 3 * len(mixtures) > 0
    for name, gradient in found.items():
        assert gradient is not None, name
        other = expected[name]
        assert torch.equal(gradient, torch.zeros_like(gradient) if other is None else other), name


def test_without_gradients_nothing_is_touched():
    decoder = tiny_decoder().float()
    touched = copy.deepcopy(decoder)
    touch_idle_experts(touched)
    batch = Batch.of([3])
    with torch.no_grad():
        assert torch.equal(touched(torch.arange(3), batch), decoder(torch.arange(3), batch))
