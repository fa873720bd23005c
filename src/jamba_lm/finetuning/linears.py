"""The matrices of a decoder by what they are for, and which of them a recipe means.

Knows names and shapes, and nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from jamba_lm.errors import RecipeError
from jamba_lm.model.decoder import Decoder
from jamba_lm.quantization.linear import PackedLinear

LEAVES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "experts": ("gate_proj", "up_proj", "down_proj"),
    "router": ("router",),
    "embedding": ("embedding",),
    "head": ("head",),
}
# The others are trained when asked for only: a router that moves changes which expert learned what,
# and new values of embedding and head are for the few tokens that were read.
USUAL = ("attention", "mamba", "mlp", "experts")


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """One linear module: inside a layer, the head, or the embedding, linear in which token it is.

    Attributes:
        path: its name in the decoder.
        layer: which layer it is in; None for embedding and head.
        kind: one of `LEAVES`.
        leaf: the last part of its name.
        outputs: of its matrix.
        inputs: likewise.
    """

    path: str
    layer: int | None
    kind: str
    leaf: str
    outputs: int
    inputs: int

    @property
    def num_values(self) -> int:
        """Values of its matrix."""
        return self.outputs * self.inputs

    @property
    def part(self) -> str:
        """What a table calls it and its like in other layers."""
        return self.kind if self.kind == self.leaf else f"{self.kind}.{self.leaf}"

    def is_meant(self, target: str) -> bool:
        """Say whether "experts", "gate_proj" or "experts.gate_proj" means this one."""
        return target in (self.kind, self.leaf, f"{self.kind}.{self.leaf}")


def linear_places(decoder: Decoder) -> list[LinearPlace]:
    """List the matrices that may have an adapter; embedding and head when they are two."""
    places = []
    if decoder.head is not None:
        for name, module in (("embedding", decoder.embedding), ("head", decoder.head)):
            places.append(LinearPlace(name, None, name, name, *module.weight.shape))
    for path, module in decoder.named_modules():
        if not path.startswith("blocks.") or not isinstance(module, nn.Linear | PackedLinear):
            continue
        outputs, inputs = module.weight.shape
        layer, leaf = int(path.split(".")[1]), path.rpartition(".")[2]
        places.append(LinearPlace(path, layer, _kind_of(path, leaf), leaf, outputs, inputs))
    return places


def _kind_of(path: str, leaf: str) -> str:
    if ".experts." in path:
        return "experts"
    if leaf == "router":
        return "router"
    if ".feed_forward." in path:
        return "mlp"
    return "attention" if leaf in LEAVES["attention"] else "mamba"


def known_targets() -> list[str]:
    """List everything that may be a target."""
    leaves = [leaf for some in LEAVES.values() for leaf in some]
    pairs = [f"{kind}.{leaf}" for kind, some in LEAVES.items() for leaf in some]
    pairs = [pair for pair in pairs if len(set(pair.split("."))) == 2]
    return list(dict.fromkeys([*LEAVES, *leaves, *pairs]))


def chosen_places(decoder: Decoder, targets: Sequence[str]) -> list[LinearPlace]:
    """List the linear modules that `targets` mean; without any, the usual ones.

    Raises:
        RecipeError: a target means none of this model's.
    """
    places = linear_places(decoder)
    for target in targets:
        if target in ("embedding", "head") and decoder.head is None:
            raise RecipeError(
                f"adapter.targets names {target!r}, and this model uses one matrix for embedding "
                "and head: an adapter would change the one and not the other; leave it out, or "
                "train all weights (no [adapter] section)"
            )
        if not any(place.is_meant(target) for place in places):
            there = sorted({place.part for place in places})
            raise RecipeError(
                f"adapter.targets names {target!r}, and this model has none: an adapter there "
                f"would never get a gradient; it has {', '.join(there)}"
            )
    wanted = targets or USUAL
    return [one for one in places if any(one.is_meant(target) for target in wanted)]
