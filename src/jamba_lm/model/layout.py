"""Which layer is what: the only place where a layer index meets a modulo.

Paper: Jamba (arXiv 2403.19887) section 2 and Figure 1; the released model has l=8, a:m=1:7, e=2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jamba_lm.config import JambaConfig

Mixer = Literal["attention", "mamba"]
FeedForward = Literal["mlp", "moe"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The two choices that make one layer: how it mixes tokens, how it mixes channels."""

    index: int
    mixer: Mixer
    feed_forward: FeedForward


def plan_layers(config: JambaConfig) -> tuple[LayerSpec, ...]:
    """List the layers of `config` from the first to the last.

    A mixture of one expert is a plain MLP, without a router: that is how the dense models are
    written down.

    >>> plan = plan_layers(JambaConfig())
    >>> [layer.index for layer in plan if layer.mixer == "attention"]
    [4, 12, 20, 28]
    >>> [layer.index for layer in plan if layer.feed_forward == "moe"][:3]
    [1, 3, 5]
    >>> any(layer.feed_forward == "moe" for layer in plan_layers(JambaConfig(num_experts=1)))
    False
    """
    return tuple(
        LayerSpec(
            index=index,
            mixer="attention"
            if index % config.attention_period == config.attention_offset
            else "mamba",
            feed_forward="moe"
            if config.num_experts > 1 and index % config.expert_period == config.expert_offset
            else "mlp",
        )
        for index in range(config.num_layers)
    )


def draw_layers(config: JambaConfig) -> str:
    """Draw the stack on one line: `A`/`m` is the mixer, `*` marks a mixture of experts.

    >>> draw_layers(JambaConfig(num_layers=8))
    'm m* m m* A m* m m*'
    """
    return " ".join(draw_layer(layer) for layer in plan_layers(config))


def draw_layer(layer: LayerSpec) -> str:
    """Draw one layer in one or two characters, as `draw_layers` does."""
    return ("A" if layer.mixer == "attention" else "m") + (
        "*" if layer.feed_forward == "moe" else ""
    )
