"""Every tensor of a model, by shape and number, without making one.

The table that parameter counts, bytes and operations are computed from. Needs no torch; a test
holds it against the real decoder, tensor by tensor.

D model width, C Mamba channels, N state size, W convolution taps, R rank of dt, H query heads,
G key/value heads, P head width, F feed-forward width, X experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers

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
        *_mamba(config, kinds["mamba"]),
        *_attention(config, kinds["attention"]),
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


def _mamba(config: JambaConfig, count: int) -> list[TensorGroup]:
    D, C, N, R = config.d_model, config.d_inner, config.state_size, config.dt_rank
    groups = [
        _every("Mamba", "mixer.in_proj.weight", (2 * C, D), count),
        _every("Mamba", "mixer.conv_CW", (C, config.conv_width), count),
        _every("Mamba", "mixer.x_proj.weight", (R + 2 * N, C), count),
        _every("Mamba", "mixer.dt_proj.weight", (C, R), count),
        _every("Mamba", "mixer.dt_bias_C", (C,), count),
        _every("Mamba", "mixer.log_decay_CN", (C, N), count, wide=True),
        _every("Mamba", "mixer.skip_C", (C,), count, wide=True),
        _every("Mamba", "mixer.out_proj.weight", (D, C), count),
    ]
    if config.conv_bias:
        groups.append(_every("Mamba", "mixer.conv_bias_C", (C,), count))
    if config.proj_bias:
        groups.append(_every("Mamba", "mixer.in_proj.bias", (2 * C,), count))
        groups.append(_every("Mamba", "mixer.out_proj.bias", (D,), count))
    if config.inner_norms:
        groups += [
            _every("Mamba", f"mixer.{name}_norm.weight", (size,), count)
            for name, size in [("dt", R), ("B", N), ("C", N)]
        ]
    return groups


def _attention(config: JambaConfig, count: int) -> list[TensorGroup]:
    D, P = config.d_model, config.d_head
    queries, keys = config.num_heads * P, config.num_kv_heads * P
    return [
        _every("attention", "mixer.q_proj.weight", (queries, D), count),
        _every("attention", "mixer.k_proj.weight", (keys, D), count),
        _every("attention", "mixer.v_proj.weight", (keys, D), count),
        _every("attention", "mixer.o_proj.weight", (D, queries), count),
    ]


def _feed_forward(config: JambaConfig, mlps: int, mixtures: int) -> list[TensorGroup]:
    D, F, X = config.d_model, config.d_ff, config.num_experts
    shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return [
        *(
            _every("MLP", f"feed_forward.{name}.weight", shape, mlps)
            for name, shape in shapes.items()
        ),
        _every("router", "feed_forward.router.weight", (X, D), mixtures),
        *(
            TensorGroup(
                "experts",
                f"feed_forward.experts.{name}.weight",
                shape,
                copies=mixtures * X,
                active_copies=mixtures * config.experts_per_token,
            )
            for name, shape in shapes.items()
        ),
    ]
