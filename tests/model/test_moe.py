"""The mixture of experts computes the published function, and its loss the published loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jamba_lm.errors import InputError
from jamba_lm.model.batch import Batch
from jamba_lm.model.moe import MoE
from jamba_lm.model.routing import Routing, balance_loss
from tests.arms import SMALL
from tests.tolerances import ANY_SPLIT, assert_within


def mixture(**changes: int) -> MoE:
    moe = MoE(SMALL.replace(**changes))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.3)
    return moe


def by_definition(moe: MoE, x_MD: torch.Tensor) -> torch.Tensor:
    rows = []
    for x in x_MD:
        probability = F.softmax(moe.router(x).float(), dim=-1)
        weight, expert = probability.topk(moe.experts_per_token)
        rows.append(
            sum(w * moe.experts[e](x, Batch.of([1])) for w, e in zip(weight, expert, strict=True))
        )
    return torch.stack(rows)


@pytest.mark.parametrize(("num_experts", "taken"), [(2, 1), (4, 2), (4, 3), (16, 2)])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_every_row_gets_its_experts(num_experts: int, taken: int, rows: int):
    moe = mixture(num_experts=num_experts, experts_per_token=taken)
    x_MD = torch.randn(rows, SMALL.d_model)
    assert_within(moe(x_MD, Batch.of([len(x_MD)])), by_definition(moe, x_MD), ANY_SPLIT["fp32"])


@pytest.mark.parametrize(("num_experts", "taken"), [(4, 2), (16, 2)])
@pytest.mark.parametrize("rows", [1, 7, 33, 300])
def test_rows_that_fill_up_an_expert_push_no_other_row_away(
    num_experts: int, taken: int, rows: int
):
    """In bfloat16 experts are given few different numbers of rows; see `moe.round_up`."""
    moe = mixture(num_experts=num_experts, experts_per_token=taken).to(torch.bfloat16)
    x_MD = torch.randn(rows, SMALL.d_model).to(torch.bfloat16)
    batch = Batch.of([rows], routing=[])
    found = moe(x_MD, batch)
    assert batch.routing is not None
    (routing,) = batch.routing
    moe.float()
    # By the choice that was made: in another type a near tie may be decided otherwise.
    expected = torch.stack(
        [
            sum(p[e] * moe.experts[e](x.float(), Batch.of([1])) for e in chosen)
            for x, p, chosen in zip(x_MD, routing.probability_MX, routing.expert_MK, strict=True)
        ]
    )
    assert_within(found.float(), expected, ANY_SPLIT["bf16"])


def test_router_weights_are_not_renormalised():
    moe = mixture()
    with torch.no_grad():
        for expert in moe.experts:
            expert.load_state_dict(moe.experts[0].state_dict())
    x_MD = torch.randn(9, SMALL.d_model)
    kept = moe.router(x_MD).softmax(-1).topk(2).values.sum(-1, keepdim=True)
    assert float(kept.detach().max()) < 0.999, "the case must tell the two rules apart"
    assert_within(
        moe(x_MD, Batch.of([len(x_MD)])),
        kept * moe.experts[0](x_MD, Batch.of([9])),
        ANY_SPLIT["fp32"],
    )


def test_no_row_is_dropped_when_all_choose_one_expert():
    moe = mixture(experts_per_token=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1
    x_MD = torch.rand(64, SMALL.d_model)
    assert_within(moe(x_MD, Batch.of([len(x_MD)])), by_definition(moe, x_MD), ANY_SPLIT["fp32"])
    assert bool((moe(x_MD, Batch.of([len(x_MD)])).abs().sum(-1) > 0).all())


def test_gradients_are_those_of_the_definition():
    moe = mixture()
    x_MD = torch.randn(17, SMALL.d_model)
    found = torch.autograd.grad(
        moe(x_MD, Batch.of([len(x_MD)])).square().sum(), list(moe.parameters())
    )
    expected = torch.autograd.grad(by_definition(moe, x_MD).square().sum(), list(moe.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert_within(one, other, ANY_SPLIT["gradient"])


def test_perfect_balance_costs_the_number_of_experts_taken():
    probability_MX = torch.full((8, 4), 0.25)
    expert_MK = torch.tensor([[0, 1], [2, 3]] * 4)
    assert float(balance_loss([Routing(probability_MX, expert_MK)])) == pytest.approx(2.0)


def test_the_balance_loss_is_that_of_transformers():
    from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

    logits = [torch.randn(21, 4) for _ in range(3)]
    routings = []
    for one in logits:
        probability_MX = one.softmax(-1)
        routings.append(Routing(probability_MX, probability_MX.topk(2).indices))
    expected = load_balancing_loss_func(tuple(logits), num_experts=4, top_k=2)
    torch.testing.assert_close(balance_loss(routings), expected)


def test_the_balance_loss_pushes_the_router_towards_balance():
    moe = mixture()
    routing: list[Routing] = []
    with torch.no_grad():
        moe.router.weight[1] += 0.1
    x_MD = torch.rand(50, SMALL.d_model)
    moe(x_MD, Batch.of([50], routing=routing))
    balance_loss(routing).backward()
    step = moe.router.weight.detach() - 0.1 * moe.router.weight.grad
    before = moe.router(x_MD).softmax(-1).mean(0)[1]
    after = F.linear(x_MD, step).softmax(-1).mean(0)[1]
    assert after.item() < before.item()


def test_a_balance_loss_of_nothing_is_refused():
    with pytest.raises(InputError, match="num_experts > 1"):
        balance_loss([])
