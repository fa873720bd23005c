"""Losses and gradients of a decoder on several processes, beside those of the same one on one.

Each process has the whole decoder too, computes with it what one process would, and compares the
gradient of every parameter that it holds with its part of the whole one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from jamba_lm.config import JambaConfig
from jamba_lm.data import IGNORED, PackedBatch
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.training import loss
from jamba_lm.training.balance import count_selections, share_of_balance_loss
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.parallel import vocabulary
from jamba_lm.training.parallel.decoder import Parallelized, parallelize
from jamba_lm.training.parallel.layout import ParallelLayout
from jamba_lm.training.validation import output_weight
from tests.arms import ARMS, SMALL, shaken_model

AUX_COEF, Z_COEF = 0.5, 0.05

CONFIGS: dict[str, JambaConfig] = {
    "hybrid": SMALL.replace(vocab_size=96),
    "dense, tied, biases, one key head": ARMS["narrow convolution, tied, one key head"].replace(
        vocab_size=96, num_experts=1
    ),
    "rotary, no inner norms": SMALL.replace(vocab_size=96, position="rope", inner_norms=False),
    "wide convolution": SMALL.replace(vocab_size=96, conv_width=8),
}
# Documents of every reader: 25 rows do not divide by 2 or 4, and most cuts go through a document.
RAGGED = [[7, 1, 12, 5], [3, 20, 2], [25], [1, 1, 1, 10, 12]]
LONG = [[2, 40, 1], [43], [20, 23], [1, 42]]
SHORT = [[5], [4], [1, 4], [2, 2, 1]]
ONE_EACH = [[1, 1, 1, 1, 1]] * 4


@dataclass(frozen=True)
class Case:
    """What runs on the processes of one layout.

    Attributes:
        lengths: of the documents of each reader.
        wrap: also cut the weights with FSDP2.
        lopsided: the routers send nearly every row to the same experts.
    """

    layout: ParallelLayout
    config: str = "hybrid"
    lengths: tuple[tuple[int, ...], ...] = tuple(map(tuple, RAGGED))
    wrap: bool = False
    lopsided: bool = False


def model_of(case: Case) -> Decoder:
    decoder = _model(case.config)
    if case.lopsided:
        decoder = copy.deepcopy(decoder)
        with torch.no_grad():
            for name, weight in decoder.named_parameters():
                if name.endswith("router.weight"):
                    weight.mul_(0.05)
                    weight[1:3] += 4.0 * weight[1:3].sign()
    return decoder


@cache
def _model(config: str) -> Decoder:
    return shaken_model(CONFIGS[config]).decoder


def packed_of(case: Case, reader: int) -> PackedBatch:
    """Return what a reader reads: ids that depend on nothing but its number."""
    lengths = list(case.lengths[reader])
    draw = torch.Generator().manual_seed(reader)
    ids_M = torch.randint(CONFIGS[case.config].vocab_size, (sum(lengths),), generator=draw)
    targets_M = ids_M.roll(-1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    targets_M[ends] = IGNORED
    if int((targets_M != IGNORED).sum()) == 0:
        targets_M[0] = 1
    return PackedBatch(ids_M, targets_M, lengths)


def on_one_process(
    case: Case, decoder: Decoder, packs: list[PackedBatch]
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of all readers' rows together."""
    lengths = [length for packed in packs for length in packed.lengths]
    targets_M = torch.cat([packed.targets_M for packed in packs])
    routing: list[Routing] = []
    hidden_MD = decoder(
        torch.cat([packed.ids_M for packed in packs]),
        Batch.of(lengths, routing=routing),
        hidden=True,
    )
    sums = summed_losses(hidden_MD, output_weight(decoder), targets_M, Z_COEF)
    total = sums.total / int((targets_M != IGNORED).sum())
    if routing:
        total = total + AUX_COEF * balance_loss(routing)
    total.backward()
    gradients = {
        name: torch.zeros_like(one) if one.grad is None else one.grad
        for name, one in decoder.named_parameters()
    }
    return total.item(), gradients


def on_many(case: Case, parallel: Parallelized, packed: PackedBatch, num_targets: int) -> float:
    """Leave the gradients in the parallel decoder; return the loss of all processes' rows."""
    share = parallel.share_of(packed)
    hidden = parallel.decoder(share.ids_M, share.batch, hidden=True)
    sums = parallel.losses(hidden, share.targets_M, Z_COEF)
    total = sums.total / num_targets
    if share.routing:
        selections = parallel.sum_selections(count_selections([share.routing]))
        total = total + AUX_COEF * share_of_balance_loss(share.routing, selections)
    total.backward()
    if not case.wrap:
        parallel.sum_gradients()
    return parallel.sum_over_rows(total.detach().clone()).item()


def wrap(parallel: Parallelized) -> None:
    """Cut the weights over the processes that hold other rows, as a trainer would."""
    layout, mesh = parallel.layout, parallel.mesh
    rows = mesh["shard", "context"]._flatten("rows")
    assert layout.replicate == 1
    modules: list[Any] = []
    if parallel.expert_mesh is not None:
        shards = parallel.expert_mesh["expert_shard"]
        modules += [fully_shard(experts, mesh=shards) for experts in parallel.experts()]
    modules += [fully_shard(block, mesh=rows) for block in parallel.decoder.blocks]
    modules.append(fully_shard(parallel.decoder, mesh=rows))
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        # gloo has no sum that divides on the way.
        module.set_force_sum_reduction_for_comms(True)


def compare(case: Case, parallel: Parallelized, expected: dict[str, Tensor]) -> dict[str, float]:
    """Return how far each gradient is from its part of the whole one, over the whole's scale."""
    errors = {}
    for name, parameter in parallel.decoder.named_parameters():
        placement, gradient = parallel.placements[name], parameter.grad
        whole = placement.part(expected[placement.whole])
        scale = max(whole.abs().max().item(), 1e-30)
        assert gradient is not None, f"{name} has no gradient"
        if isinstance(gradient, DTensor):
            # Every process's copy of what all have, not the first one's.
            repeated = placement.axis is None and not case.wrap
            gradient = gradient.to_local() if repeated else gradient.full_tensor()
        assert gradient.shape == whole.shape, f"{name} {gradient.shape} is not {whole.shape}"
        errors[name] = (gradient - whole).abs().max().item() / scale
    return errors


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """Return the largest difference of the losses and of every gradient held here."""
    layout = case.layout
    whole = model_of(case)
    share = copy.deepcopy(whole)
    packs = [packed_of(case, reader) for reader in range(layout.num_readers)]
    expected_loss, expected = on_one_process(case, copy.deepcopy(whole), packs)
    parallel = parallelize(share, layout, layout.mesh("cpu"))
    if case.wrap:
        wrap(parallel)
    num_targets = sum(int((packed.targets_M != IGNORED).sum()) for packed in packs)
    found_loss = on_many(case, parallel, packs[layout.reader(rank)], num_targets)
    errors = compare(case, parallel, expected)
    errors["loss"] = abs(found_loss - expected_loss) / abs(expected_loss)
    returned = dict(parallel.whole_values())
    original = dict(whole.named_parameters())
    same = list(returned) == list(original) and all(
        torch.equal(returned[name], original[name]) for name in original
    )
    return {"errors": errors, "whole values come back": same}


def small_chunks() -> None:
    """Let the loss see several pieces of rows, which these batches are too small for."""
    loss.CHUNK_ROWS = vocabulary.CHUNK_ROWS = 8


L = ParallelLayout
CASES: dict[int, dict[str, Case]] = {
    2: {
        "data": Case(L(shard=2)),
        "FSDP": Case(L(shard=2), wrap=True),
        "tensor": Case(L(tensor=2)),
        "tensor, other arms": Case(L(tensor=2), "dense, tied, biases, one key head"),
        "tensor, rotary": Case(L(tensor=2), "rotary, no inner norms"),
        "sequence": Case(L(tensor=2, sequence=True)),
        "sequence, other arms": Case(
            L(tensor=2, sequence=True), "dense, tied, biases, one key head"
        ),
        "context": Case(L(context=2)),
        "context, a cut between documents": Case(L(context=2), lengths=((13, 12),)),
        "context, rotary": Case(L(context=2), "rotary, no inner norms"),
        "context, other arms": Case(L(context=2), "dense, tied, biases, one key head"),
        "expert": Case(L(shard=2, expert=2)),
        "expert, uneven loads": Case(L(shard=2, expert=2), lopsided=True),
        "expert with context": Case(L(context=2, expert=2)),
    },
    4: {
        "tensor over more than the key heads": Case(L(tensor=4)),
        "sequence, uneven rows": Case(L(tensor=4, sequence=True)),
        "sequence, a process without rows": Case(L(tensor=4, sequence=True), lengths=((3,),)),
        "context, a document through all": Case(L(context=4), lengths=((2, 40, 1),)),
        "context, pieces shorter than the convolution": Case(
            L(context=4), "wide convolution", lengths=((1, 8, 2),)
        ),
        "context, a row each": Case(L(context=4), lengths=((4,),)),
        "expert": Case(L(shard=4, expert=4)),
        "expert, uneven loads": Case(L(shard=4, expert=4), lopsided=True),
        "expert with expert shards": Case(L(shard=4, expert=2), lopsided=True),
        "expert with FSDP": Case(L(shard=4, expert=2), wrap=True),
        "tensor with FSDP": Case(L(shard=2, tensor=2), wrap=True),
        "sequence with FSDP": Case(L(shard=2, tensor=2, sequence=True), wrap=True),
        "context with FSDP": Case(L(shard=2, context=2), wrap=True),
        "expert with context and FSDP": Case(L(shard=2, context=2, expert=2), wrap=True),
        "expert over shard and context": Case(L(shard=2, context=2, expert=4)),
        "tensor with expert": Case(L(shard=2, tensor=2, expert=2)),
        "sequence with expert": Case(L(shard=2, tensor=2, expert=2, sequence=True)),
        "tensor with context": Case(L(context=2, tensor=2)),
        "sequence with context": Case(L(context=2, tensor=2, sequence=True)),
        "tensor with context and expert": Case(L(context=2, tensor=2, expert=2)),
        "replicate with shard": Case(L(replicate=2, shard=2, expert=2)),
    },
}


def on_process(rank: int, world_size: int, *chosen: str) -> dict[str, Any]:
    """Run the cases of this many processes; those named, or all."""
    small_chunks()
    cases = CASES[world_size]
    return {name: run_case(cases[name], rank) for name in chosen or cases}
