"""Every tensor of a model, by shape and number, without making one.

The table that parameter counts, bytes and operations are computed from. Needs no torch; a test
holds it against the real decoder, tensor by tensor.

D model width, C Mamba channels, N state size, W convolution taps, R rank of dt, H query heads,
G key/value heads, P head width, F feed-forward width, X experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.parameters import (
    KEPT_WIDE,
    Shape,
    attention_shapes,
    mamba_shapes,
    mlp_shapes,
)

Part = Literal["experts", "MLP", "router", "Mamba", "attention", "norms", "embedding", "head"]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one name and shape.

    Attributes:
        part: where the table of parameters counts them.
        name: their name within a layer or the model.
        shape: the shape of one.
        copies: how many the model has.
        active_copies: how many of them one token uses.
        wide: kept in float32 whatever the model's dtype.
    """

    part: Part
    name: str
    shape: tuple[int, ...]
    copies: int
    active_copies: int
    wide: bool = False

    @property
    def values(self) -> int:
        """How many numbers one tensor holds."""
        return math.prod(self.shape)


def list_tensors(config: JambaConfig) -> tuple[TensorGroup, ...]:
    """List every tensor of a model of this shape.

    The embedding counts as active, as in the paper's 12B; a tied head is the embedding and is not
    counted again.

    Source: transformers' `modeling_jamba.py` for the shapes.
    """
    D, V = config.d_model, config.vocab_size
    layers = plan_layers(config)
    kinds = Counter(layer.mixer for layer in layers) + Counter(
        layer.feed_forward for layer in layers
    )
    groups = [
        TensorGroup("embedding", "embedding.weight", (V, D), 1, 1),
        *_mixer("Mamba", mamba_shapes(config), kinds["mamba"]),
        *_mixer("attention", attention_shapes(config), kinds["attention"]),
        *_feed_forward(config, kinds["mlp"], kinds["moe"]),
        _every("norms", "mixer_norm.weight", (D,), len(layers)),
        _every("norms", "feed_forward_norm.weight", (D,), len(layers)),
        _every("norms", "final_norm.weight", (D,), 1),
    ]
    if not config.tie_embeddings:
        groups.append(TensorGroup("head", "head.weight", (V, D), 1, 1))
    return tuple(group for group in groups if group.copies)


def _every(
    part: Part, name: str, shape: tuple[int, ...], copies: int, *, wide: bool = False
) -> TensorGroup:
    return TensorGroup(part, name, shape, copies, copies, wide)


def _mixer(part: Part, shapes: Mapping[str, Shape], count: int) -> list[TensorGroup]:
    return [
        _every(part, f"mixer.{name}", shape, count, wide=name in KEPT_WIDE)
        for name, shape in shapes.items()
    ]


def _feed_forward(config: JambaConfig, mlps: int, mixtures: int) -> list[TensorGroup]:
    shapes, experts = mlp_shapes(config), config.num_experts
    return [
        *(_every("MLP", f"feed_forward.{name}", shape, mlps) for name, shape in shapes.items()),
        _every("router", "feed_forward.router.weight", (experts, config.d_model), mixtures),
        *(
            TensorGroup(
                "experts",
                f"feed_forward.experts.{name}",
                shape,
                copies=mixtures * experts,
                active_copies=mixtures * config.experts_per_token,
            )
            for name, shape in shapes.items()
        ),
    ]
