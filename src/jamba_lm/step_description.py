"""A model described to the native step, wherever its weights come from. Needs no torch.

Which part of a layer is which argument of the native code is said here and nowhere else.
`step_plan.py` hands over the modules of a decoder, `native_model.py` the tensors of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jamba_lm.config import JambaConfig
from jamba_lm.kernels.native_layers import Floats, MambaVectors, StepLayer, StepModel, StepSizes
from jamba_lm.kernels.native_structs import Matrix


class Weights(Protocol):
    """Gives the weights of a model by the decoder's own names."""

    def matrix(self, name: str) -> Matrix:
        """Return a matrix with its bias, if it has one, by the name of its module."""

    def vector(self, name: str) -> Floats | None:
        """Return a small parameter, in float32 and contiguous; None when there is none."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What distinguishes layers.

    Attributes:
        attends: its mixer is attention, not Mamba.
        experts: how many share its feed-forward; 0 when there is no router.
    """

    attends: bool
    experts: int


def describe_model(
    config: JambaConfig,
    layers: Sequence[LayerShape],
    weights: Weights,
    *,
    tied: bool,
    bfloat16: bool,
) -> StepModel:
    """Describe a model to the native step.

    Args:
        config: its sizes.
        layers: first to last.
        weights: what it consists of.
        tied: the head is the embedding.
        bfloat16: convolution windows, keys and values are in that type, else in float32.
    """
    embedding = weights.matrix("embedding")
    return StepModel(
        StepSizes(
            d_model=config.d_model,
            vocab_size=config.vocab_size,
            d_inner=config.d_inner,
            state_size=config.state_size,
            conv_width=config.conv_width,
            dt_rank=config.dt_rank,
            d_ff=config.d_ff,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            d_head=config.d_head,
            experts_per_token=config.experts_per_token if config.num_experts > 1 else 1,
        ),
        [_layer(f"blocks.{index}", layer, weights) for index, layer in enumerate(layers)],
        _present(weights, "final_norm.weight"),
        embedding,
        embedding if tied else weights.matrix("head"),
        bfloat16=bfloat16,
        epsilon=config.norm_eps,
        attention_scale=config.d_head**-0.5,
    )


def _layer(block: str, layer: LayerShape, weights: Weights) -> StepLayer:
    mixer, feed_forward = f"{block}.mixer", f"{block}.feed_forward"
    names = ("q", "k", "v", "o") if layer.attends else ("in", "x", "dt", "out")
    first, second, third, fourth = (weights.matrix(f"{mixer}.{name}_proj") for name in names)
    experts = [f"{feed_forward}.experts.{index}" for index in range(layer.experts)]
    return StepLayer(
        mixer_norm_D=_present(weights, f"{block}.mixer_norm.weight"),
        feed_forward_norm_D=_present(weights, f"{block}.feed_forward_norm.weight"),
        projections=(first, second, third, fourth),
        mamba=None if layer.attends else _mamba(mixer, weights),
        experts=[
            (
                weights.matrix(f"{expert}.gate_proj"),
                weights.matrix(f"{expert}.up_proj"),
                weights.matrix(f"{expert}.down_proj"),
            )
            for expert in experts or [feed_forward]
        ],
        router=weights.matrix(f"{feed_forward}.router") if experts else None,
    )


def _mamba(mixer: str, weights: Weights) -> MambaVectors:
    # In float64, as GGUF files are written: the decay is the same whichever file it went through.
    rates_CN = np.exp(_present(weights, f"{mixer}.log_decay_CN"), dtype=np.float64)
    return MambaVectors(
        conv_WC=np.ascontiguousarray(_present(weights, f"{mixer}.conv_CW").T),
        conv_bias_C=weights.vector(f"{mixer}.conv_bias_C"),
        dt_norm_R=weights.vector(f"{mixer}.dt_norm.weight"),
        B_norm_N=weights.vector(f"{mixer}.B_norm.weight"),
        C_norm_N=weights.vector(f"{mixer}.C_norm.weight"),
        dt_bias_C=_present(weights, f"{mixer}.dt_bias_C"),
        A_CN=-rates_CN.astype(np.float32),
        skip_C=_present(weights, f"{mixer}.skip_C"),
    )


def _present(weights: Weights, name: str) -> Floats:
    found = weights.vector(name)
    assert found is not None, name
    return found
