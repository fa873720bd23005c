"""What share of which part of a model is trained, counted, and tried out before the first step.

Knows modules and gradients, and no recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_lm.data import PackedBatch
from jamba_lm.errors import RecipeError
from jamba_lm.finetuning.linears import LEAVES
from jamba_lm.finetuning.low_rank import LowRankModule, adapters
from jamba_lm.model.decoder import Decoder
from jamba_lm.quantization.linear import PackedEmbedding, PackedLinear
from jamba_lm.training.segments import SegmentedPass

OTHERS = "norms, convolutions, decays, biases"
# What is left of a gradient that should be zero, against the largest of all adapters: sums of
# float32 that cancel.
ROUNDING = 1e-6


@dataclass(slots=True)
class Share:
    """How much of one part of a model is trained.

    Attributes:
        part: "mamba.in_proj", "experts.up_proj", "embedding" and so on.
        layers: how many layers have such a part, and in how many of them some of it is trained.
        tensors: likewise, weights.
        values: likewise, values of the weights that are changed; an adapter changes all of them.
        trained: values that the optimizer moves.
    """

    part: str
    layers: tuple[set[int], set[int]]
    tensors: list[int]
    values: list[int]
    trained: int = 0


def shares(decoder: Decoder) -> list[Share]:
    """Count, by part, what a decoder has and what of it is trained."""
    parts: dict[str, Share] = {}

    def count(path: str, part: str, values: int, changed: bool, trained: int) -> None:
        share = parts.setdefault(part, Share(part, (set(), set()), [0, 0], [0, 0]))
        layer = int(path.split(".")[1]) if path.startswith("blocks.") else -1
        share.layers[0].add(layer)
        share.tensors[0] += 1
        share.values[0] += values
        if changed:
            share.layers[1].add(layer)
            share.tensors[1] += 1
            share.values[1] += values
        share.trained += trained

    for path, module in decoder.named_modules():
        if isinstance(module, LowRankModule):
            trained = module.lora_A.weight.numel() + module.lora_B.weight.numel()
            outputs, inputs = module.lora_B.weight.shape[0], module.lora_A.weight.shape[1]
            count(path, _part_of(path), outputs * inputs, True, trained)
        elif isinstance(module, PackedLinear | PackedEmbedding) and not _is_adapted(decoder, path):
            outputs, inputs = module.weight.shape
            count(path, _part_of(path.removesuffix(".packed")), outputs * inputs, False, 0)
    for name, parameter in decoder.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name or (leaf == "weight" and _is_adapted(decoder, owner)):
            continue
        owner = owner.removesuffix(".base")
        part = _part_of(owner) if leaf == "weight" else OTHERS
        trained = parameter.numel() if parameter.requires_grad else 0
        count(name, part, parameter.numel(), bool(trained), trained)
    order = [*(f"{kind}.{leaf}" for kind, some in LEAVES.items() for leaf in some)]
    order = [*order, "router", "embedding", "head", OTHERS]
    return sorted(parts.values(), key=lambda share: order.index(share.part))


def _is_adapted(decoder: Decoder, path: str) -> bool:
    while path.endswith((".base", ".packed")):
        path = path.rpartition(".")[0]
        if isinstance(decoder.get_submodule(path), LowRankModule):
            return True
    return False


def _part_of(path: str) -> str:
    leaf = path.rpartition(".")[2]
    if path in ("embedding", "head"):
        return path
    if leaf == "router":
        return leaf
    for kind, leaves in LEAVES.items():
        if leaf in leaves and (kind == "experts") == (".experts." in path):
            return f"{kind}.{leaf}"
    return OTHERS


@dataclass(frozen=True, slots=True)
class Tried:
    """What a first pass showed.

    Attributes:
        reached: adapters that got a gradient in both their factors.
        unreached: paths of those in experts that no row of consequence was sent to.
    """

    reached: int
    unreached: Sequence[str]


def try_gradients(
    decoder: Decoder, packed: PackedBatch, segment_rows: int, backend: str | None = None
) -> Tried:
    """Take one pass and see that every adapter gets a gradient, in both of its factors.

    An expert that none of the rows was sent to, or only rows on which nothing depends that is
    learned, gets none this time; but some expert of its layer must. lora_B, which is zero at the
    start and would hide the gradient of lora_A, holds something else meanwhile. Nothing is changed
    in the end but the values of the adapters, which are to be drawn.

    Args:
        decoder: has adapters.
        packed: rows to read.
        segment_rows: how many of them are read at a time.
        backend: kernel back-end by name, or None.

    Raises:
        RecipeError: an adapter gets none.
    """
    draw = torch.Generator().manual_seed(0)
    for _, module in adapters(decoder):
        for factor in (module.lora_A.weight, module.lora_B.weight):
            factor.data = (0.02 * torch.randn(factor.shape, generator=draw)).to(factor.dtype)
    SegmentedPass(decoder, segment_rows, backend=backend).backward(
        packed.ids_M, packed.targets_M, packed.lengths, entropy_coef=1 / packed.num_targets
    )
    largest = {
        path: min(_largest(one.weight.grad) for one in (module.lora_A, module.lora_B))
        for path, module in adapters(decoder)
    }
    noise = ROUNDING * max(largest.values())
    still = [path for path, found in largest.items() if found <= noise]
    decoder.zero_grad(set_to_none=True)
    moving = {_same_in_experts(path) for path, _ in adapters(decoder) if path not in still}
    dead = [path for path in still if _same_in_experts(path) not in moving]
    if dead:
        raise RecipeError(
            f"{len(dead)} of {len(adapters(decoder))} adapters get no gradient from the first "
            f"batch, so they would never learn anything; the first is {dead[0]}: take it out of "
            "adapter.targets"
        )
    return Tried(len(adapters(decoder)) - len(still), still)


def _same_in_experts(path: str) -> str:
    """Return the same name for the adapters at one place of all experts of a layer."""
    return re.sub(r"\.experts\.[0-9]+\.", ".experts.", path)


def _largest(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else gradient.abs().amax().item()
