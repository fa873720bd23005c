"""Losses and gradients of a decoder on several processes, beside those of the same one on one.

Each process has the whole decoder too, computes with it what one process would, and compares the
gradient of every parameter that it holds with its part of the whole one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from jamba_lm.config import JambaConfig
from jamba_lm.data import IGNORED, PackedBatch
from jamba_lm.errors import RecipeError
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.parallel_layout import ParallelLayout as L
from jamba_lm.training import loss
from jamba_lm.training.activation_loss import ActivationLoss
from jamba_lm.training.balance import count_selections, share_of_balance_loss
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.output import output_weight
from jamba_lm.training.parallel.decoder import Parallelized, parallelize
from jamba_lm.training.parallel.meshes import process_mesh
from jamba_lm.training.recompute import recompute_layers
from tests.arms import ARMS, SMALL, shaken_model
from tests.test_shapes import shapes_are_as_named

AUX_COEF, Z_COEF, ACTIVATION_COEF = 0.5, 0.05, 0.1

VOCABULARY = 96
HYBRID = SMALL.replace(vocab_size=VOCABULARY)
CONFIGS: dict[str, JambaConfig] = {
    "hybrid": HYBRID,
    "dense, tied, biases, one key head": ARMS["narrow convolution, tied, one key head"].replace(
        vocab_size=VOCABULARY, num_experts=1
    ),
    "rotary, no inner norms": HYBRID.replace(position="rope", inner_norms=False),
    "eight experts": HYBRID.replace(num_experts=8),
    "wide convolution": HYBRID.replace(conv_width=8),
}
# Documents of every reader: 25 rows do not divide by 2 or 4, and most cuts go through a document.
Lengths = tuple[int, ...]
RAGGED: tuple[Lengths, ...] = ((7, 1, 12, 5), (3, 20, 2), (25,), (1, 1, 1, 10, 12))


@dataclass(frozen=True)
class Case:
    """What runs on the processes of one layout.

    Attributes:
        lengths: of the documents of each reader.
        wrap: also cut the weights with FSDP2.
        lopsided: the routers send every row to the first half of eight experts.
        back: also make the whole of the parts again.
        meta: begin on the meta device, with values given afterwards.
        more: with the activation loss, and layers that run again in the backward pass.
        named: hold the names of tensors to their shapes.
    """

    layout: L
    config: str = "hybrid"
    lengths: tuple[Lengths, ...] = RAGGED
    wrap: bool = False
    lopsided: bool = False
    back: bool = False
    meta: bool = False
    more: bool = False
    named: bool = False


@cache
def whole_model(config: str, lopsided: bool) -> Decoder:
    decoder = shaken_model(CONFIGS[config]).decoder
    if lopsided:
        with torch.no_grad():
            for name, weight in decoder.named_parameters():
                if name.endswith("router.weight"):
                    # Whatever a row's product with the first is, its two largest multiples are
                    # among the first four; the others get no row from anybody.
                    multiples = torch.tensor([1.0, 2.0, -1.0, -2.0, 0.5, -0.5, 0.25, -0.25])
                    weight.copy_(multiples[:, None] * weight[:1])
    return decoder


def packed_of(lengths: Lengths, reader: int) -> PackedBatch:
    """Return what a reader reads: ids that depend on nothing but its number."""
    draw = torch.Generator().manual_seed(reader)
    ids_M = torch.randint(VOCABULARY, (sum(lengths),), generator=draw)
    targets_M = ids_M.roll(-1)
    targets_M[torch.tensor(lengths).cumsum(0) - 1] = IGNORED
    return PackedBatch(ids_M, targets_M, list(lengths))


@cache
def on_one_process(
    config: str, lopsided: bool, more: bool, read: tuple[Lengths, ...]
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of all readers' rows together."""
    decoder = copy.deepcopy(whole_model(config, lopsided))
    if more:
        ActivationLoss(decoder, ACTIVATION_COEF).begin(1.0)
    packs = [packed_of(lengths, reader) for reader, lengths in enumerate(read)]
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


def on_many(
    case: Case, parallel: Parallelized, packed: PackedBatch, num_targets: int, num_rows: int
) -> float:
    """Leave the gradients in the parallel decoder; return the loss of all processes' rows."""
    share = parallel.share_of(packed)
    if case.more:
        activation = ActivationLoss(parallel.decoder, ACTIVATION_COEF)
        recompute_layers(parallel.decoder)
        activation.begin(parallel.rows_between_layers(share) / num_rows)
    hidden = parallel.decoder(share.ids_M, share.batch, hidden=True)
    sums = parallel.losses(hidden, share.targets_M, Z_COEF)
    total = sums.total / num_targets
    if share.routing:
        selections = parallel.sum_selections(count_selections([share.routing]))
        total = total + AUX_COEF * share_of_balance_loss(share.routing, selections)
    total.backward()
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
        if case.wrap:
            gradient = gradient.full_tensor()
        else:
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if placement.axis is not None:
                place = parallel.mesh["tensor"].get_local_rank()
                whole = whole.chunk(parallel.layout.tensor, placement.axis)[place]
        assert gradient.shape == whole.shape, f"{name} {gradient.shape} is not {whole.shape}"
        errors[name] = (gradient - whole).abs().max().item() / scale
    return errors


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """Return the largest difference of the losses and of every gradient held here."""
    layout = case.layout
    # The loss sees several pieces of rows, which these batches are too small for.
    loss.CHUNK_ROWS = 1024 if case.named else 8
    whole = whole_model(case.config, case.lopsided)
    read = case.lengths[: layout.num_readers]
    packs = [packed_of(lengths, reader) for reader, lengths in enumerate(read)]
    expected_loss, expected = on_one_process(case.config, case.lopsided, case.more, read)
    parallel = made_parallel(case, whole)
    num_targets = sum(int((packed.targets_M != IGNORED).sum()) for packed in packs)
    num_rows = sum(len(packed.ids_M) for packed in packs)
    said = {"tensor": 0, "context": 0, "expert": 0}
    with counted(parallel, said), shapes_are_as_named() if case.named else nullcontext():
        found_loss = on_many(case, parallel, packs[layout.reader(rank)], num_targets, num_rows)
    if not case.wrap:
        parallel.sum_gradients()
    errors = compare(case, parallel, expected)
    errors["loss"] = abs(found_loss - expected_loss) / abs(expected_loss)
    same = gives_back(parallel, whole) if case.back else True
    return {"errors": errors, "same values": same, "said": said}


@contextmanager
def counted(parallel: Parallelized, said: dict[str, int]) -> Iterator[None]:
    """Count the values in collective calls along each axis; those along others are left out."""
    tensor, context = parallel._region.group.processes, parallel._context.processes
    names = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single")
    originals = {name: getattr(dist, name) for name in names}

    def axis_of(name: str, group: Any) -> str | None:
        # Two axes of the same processes have one group, and counts of rows are sums over it too.
        if name == "all_to_all_single":
            return "expert"
        if group is not None and group is tensor:
            return "tensor"
        passed_on = name != "all_reduce" and group is not None and group is context
        return "context" if passed_on else None

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            axis = axis_of(name, kwargs["group"] if "group" in kwargs else args[-1])
            # The largest side: what comes of a gather, and what is given to the others.
            sides = (*args, kwargs.get("output"), kwargs.get("input"))
            side = sides[0] if name in ("all_reduce", "all_gather_single") else sides[1]
            if axis is not None and side.is_floating_point():
                said[axis] += side.numel()
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def made_parallel(case: Case, whole: Decoder) -> Parallelized:
    """Return this process's share of the model, in one of the ways to come to it."""
    mesh = process_mesh(case.layout, "cpu")
    if not case.meta:
        parallel = parallelize(copy.deepcopy(whole), case.layout, mesh)
        if case.wrap:
            wrap(parallel)
        return parallel
    with torch.device("meta"):
        decoder = Decoder(whole.config)
    parallel = parallelize(decoder, case.layout, mesh)
    if case.wrap:
        wrap(parallel)
    decoder.to_empty(device="cpu")
    parallel.load(lambda name: whole.get_parameter(name).detach())
    return parallel


def gives_back(parallel: Parallelized, whole: Decoder) -> bool:
    """Whether the parts make the whole again, and take other values of it."""
    expected = {name: one.detach() for name, one in whole.named_parameters()}
    returned = dict(parallel.whole_values())
    same = list(returned) == list(expected) and all(
        torch.equal(returned[name], expected[name]) for name in expected
    )
    with pytest.raises(RecipeError, match=r"'embedding.weight' has shape \(3,\), the"):
        parallel.load(lambda _: torch.zeros(3))
    parallel.load(lambda name: 2.0 * expected[name])
    loaded = dict(parallel.whole_values())
    return same and all(torch.equal(loaded[name], 2.0 * expected[name]) for name in expected)


CASES: dict[int, dict[str, Case]] = {
    2: {
        "data": Case(L(shard=2)),
        "FSDP": Case(L(shard=2), wrap=True, back=True),
        "tensor": Case(L(tensor=2), back=True),
        "tensor, other arms": Case(L(tensor=2), "dense, tied, biases, one key head"),
        "tensor, rotary": Case(L(tensor=2), "rotary, no inner norms", named=True),
        "sequence": Case(L(tensor=2, sequence=True), meta=True, more=True),
        "sequence, other arms": Case(
            L(tensor=2, sequence=True), "dense, tied, biases, one key head"
        ),
        "context": Case(L(context=2), more=True),
        "context, a cut between documents": Case(L(context=2), lengths=((13, 12),)),
        "context, rotary": Case(L(context=2), "rotary, no inner norms", named=True),
        "context, other arms": Case(L(context=2), "dense, tied, biases, one key head"),
        "expert": Case(L(shard=2, expert=2), back=True),
        "expert, uneven loads": Case(L(shard=2, expert=2), "eight experts", lopsided=True),
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
        "expert": Case(L(shard=4, expert=4)),
        "expert, uneven loads": Case(L(shard=4, expert=4), "eight experts", lopsided=True),
        "expert with FSDP": Case(
            L(shard=4, expert=2),
            "eight experts",
            wrap=True,
            lopsided=True,
            meta=True,
            back=True,
        ),
        "tensor with FSDP": Case(L(shard=2, tensor=2), wrap=True, back=True),
        "sequence with FSDP": Case(L(shard=2, tensor=2, sequence=True), wrap=True, meta=True),
        "context with FSDP": Case(L(shard=2, context=2), wrap=True),
        "expert over shard and context": Case(L(shard=2, context=2, expert=4)),
        "expert with context": Case(L(shard=2, context=2, expert=2)),
        "sequence with expert": Case(L(shard=2, tensor=2, expert=2, sequence=True), back=True),
        "tensor with expert": Case(L(shard=2, tensor=2, expert=2), named=True),
        "tensor with context": Case(L(context=2, tensor=2), named=True),
        "sequence with context and expert": Case(
            L(context=2, tensor=2, expert=2, sequence=True), more=True
        ),
        "replicate with expert": Case(L(replicate=2, shard=2, expert=2)),
    },
}


def on_process(rank: int, world_size: int, *chosen: str) -> dict[str, Any]:
    """Run the cases of this many processes; those named, or all."""
    cases = CASES[world_size]
    return {name: run_case(cases[name], rank) for name in chosen or cases}
