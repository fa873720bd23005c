"""Values for the parameters of a model that starts from nothing.

Each parameter's values depend on its name, its shape and the seed alone, so they can be made in any
order, one at a time.
"""

from __future__ import annotations

import math
from hashlib import sha256

import torch
from torch import Tensor

from jamba_lm.config import JambaConfig
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import KEPT_WIDE

# Mamba's recipe: steps are drawn log-uniformly between these, and never under the floor.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4

# Projections whose output is added to the residual stream.
RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")


def initial_value(
    config: JambaConfig, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> Tensor:
    """Return fresh values for the parameter `name` of a decoder.

    Matrices are normal with `initializer_range`; those that feed the residual stream are divided by
    sqrt(2 * layers), so that its size does not grow with depth. The convolution, dt and the decays
    start as Mamba's do: transformers' own initialisation sets the bias of dt to zero, which makes
    every step 0.69 instead of 0.001..0.1 and is not how these models were trained.

    Source: state-spaces/mamba `mamba_simple.py` and `mixer_seq_simple.py`.
    """
    leaf = name.rsplit(".", 1)[-1]
    kept = torch.float32 if leaf in KEPT_WIDE else dtype
    draw = torch.Generator().manual_seed(_seed(seed, name))

    if name.endswith("norm.weight") or leaf == "skip_C":
        return torch.ones(shape, dtype=kept)
    if leaf == "bias":
        return torch.zeros(shape, dtype=kept)
    if leaf == "log_decay_CN":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().repeat(shape[0], 1)
    if leaf in ("conv_CW", "conv_bias_C"):
        bound = config.conv_width**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=draw).to(kept)
    if leaf == "dt_bias_C":
        share = torch.rand(shape, generator=draw, dtype=torch.float64)
        step = torch.exp(math.log(DT_MIN) + share * (math.log(DT_MAX) - math.log(DT_MIN)))
        step = step.clamp_min(DT_FLOOR)
        return (step + torch.log(-torch.expm1(-step))).to(kept)  # the inverse of softplus
    if name.endswith("dt_proj.weight"):
        bound = config.dt_rank**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=draw).to(kept)

    deviation = config.initializer_range
    if name.endswith(RESIDUAL):
        deviation /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, deviation, generator=draw).to(kept)


def initialize(decoder: Decoder, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter of `decoder`, which may be on the meta device, its initial value."""
    for name, parameter in list(decoder.named_parameters()):
        value = initial_value(decoder.config, name, tuple(parameter.shape), dtype, seed)
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, torch.nn.Parameter(value))


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
