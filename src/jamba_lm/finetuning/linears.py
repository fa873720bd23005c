"""The linear modules of a decoder by what they are for, and which of them a recipe means.

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
}
# A router that moves changes which expert learned what: it is trained when asked for only.
USUAL = ("attention", "mamba", "mlp", "experts")


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """One linear module inside a layer.

    Attributes:
        path: its name in the decoder.
        layer: which layer it is in.
        kind: one of `LEAVES`.
        leaf: the last part of its name.
        outputs: of its matrix.
        inputs: likewise.
    """

    path: str
    layer: int
    kind: str
    leaf: str
    outputs: int
    inputs: int

    @property
    def num_values(self) -> int:
        """Values of its matrix."""
        return self.outputs * self.inputs

    def is_meant(self, target: str) -> bool:
        """Say whether "experts", "gate_proj" or "experts.gate_proj" means this one."""
        return target in (self.kind, self.leaf, f"{self.kind}.{self.leaf}")


def linear_places(decoder: Decoder) -> list[LinearPlace]:
    """List the linear modules of all layers, in order."""
    places = []
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
    return list(dict.fromkeys([*LEAVES, *leaves, *pairs]))


def chosen_places(decoder: Decoder, targets: Sequence[str]) -> list[LinearPlace]:
    """List the linear modules that `targets` mean; without any, the usual ones.

    Raises:
        RecipeError: a target means none of this model's.
    """
    places = linear_places(decoder)
    for target in targets:
        if not any(place.is_meant(target) for place in places):
            there = sorted({f"{place.kind}.{place.leaf}" for place in places})
            raise RecipeError(
                f"adapter.targets names {target!r}, and this model has none: an adapter there "
                f"would never get a gradient; it has {', '.join(there)}"
            )
    wanted = targets or USUAL
    return [one for one in places if any(one.is_meant(target) for target in wanted)]
