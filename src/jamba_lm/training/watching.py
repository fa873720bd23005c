"""What a training pass shows of the inside of a model: the largest activations, the router's load.

Knows a decoder's layers, and neither losses nor logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jamba_lm.model.decoder import Decoder
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.routing import Routing
from jamba_lm.training.balance import load_of
from jamba_lm.training.together import Together

Maxima = dict[str, dict[str, float]]


class Taps(nn.ModuleDict):
    """What passes through a mixer that does not call its projections, by the name of the place.

    `watched` looks here, where there is one, and not at the projections.
    """

    def __init__(self) -> None:
        super().__init__({place: nn.Identity() for place in ("in_proj", "x_proj", "dt_proj")})
        self["gated"] = nn.Identity()

    def see(self, place: str, x: Tensor) -> Tensor:
        """Let `x` through."""
        seen: Tensor = self[place](x)
        return seen


@contextmanager
def watched(decoder: Decoder) -> Iterator[Maxima]:
    """Record the largest absolute values inside each layer of the passes meanwhile.

    They are kept by `blocks.3`, and in it by place: of every layer what the `mixer` and the
    `feed_forward` give and the `residual` stream behind them, of Mamba also `in_proj` (input and
    gate), `x_proj` (dt, B and C before their norms), `dt_proj` and `gated` (scan times gate).

    Paper: Jamba §6.4: large inner activations came before loss spikes.
    """
    found: Maxima = {}
    hooks: list[Any] = []

    def note(layer: dict[str, float], place: str, x: Tensor) -> None:
        layer[place] = max(layer.get(place, 0.0), x.detach().abs().amax().item())

    def output_of(module: nn.Module, layer: dict[str, float], place: str) -> None:
        hooks.append(module.register_forward_hook(lambda _m, _i, x: note(layer, place, x)))

    for number, block in enumerate(decoder.blocks):
        layer = found[f"blocks.{number}"] = {}
        mixer = block.get_submodule("mixer")
        if isinstance(taps := getattr(mixer, "taps", None), Taps):
            for place, tap in taps.items():
                output_of(tap, layer, place)
        elif isinstance(mixer, MambaMixer):
            for place in ("in_proj", "x_proj", "dt_proj"):
                output_of(mixer.get_submodule(place), layer, place)
            hooks.append(
                mixer.out_proj.register_forward_pre_hook(
                    lambda _m, inputs, layer=layer: note(layer, "gated", inputs[0])
                )
            )
        output_of(mixer, layer, "mixer")
        output_of(block.get_submodule("feed_forward"), layer, "feed_forward")
        output_of(block, layer, "residual")
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def largest(passes: Sequence[Maxima]) -> Maxima:
    """Return the maxima over several passes."""
    return {
        name: {place: max(one[name][place] for one in passes) for place in places}
        for name, places in passes[0].items()
    }


def all_largest(maxima: Maxima, together: Together) -> Maxima:
    """Return the maxima over all processes."""
    values = iter(
        together.largest([value for places in maxima.values() for value in places.values()])
    )
    return {name: {place: next(values) for place in places} for name, places in maxima.items()}


def router_load(
    decoder: Decoder, passes: Sequence[Sequence[Tensor]], together: Together
) -> dict[str, list[float]]:
    """Return what share of its rows each expert got, by layer; 1 / experts each is balance.

    Args:
        decoder: whose routers they are.
        passes: of each pass of this process, the `loads` of its layers.
        together: the processes that took passes.
    """
    layers = [
        f"blocks.{number}"
        for number, block in enumerate(decoder.blocks)
        if hasattr(block.feed_forward, "router")
    ]
    summed = [
        together.add_up_tensor(torch.stack(list(loads)).sum(0))
        for loads in zip(*passes, strict=True)
    ]
    return {
        name: (load_X / load_X.sum()).tolist() for name, load_X in zip(layers, summed, strict=True)
    }


def loads(routings: Sequence[Routing]) -> list[Tensor]:
    """Return how often each layer of a pass takes each expert."""
    return [load_of(one) for one in routings]


def by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Return the gradient norms of parameters as those of `embedding`, `blocks.0` and so on."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    return {layer: square**0.5 for layer, square in sorted(squares.items())}
