"""A finished decoder, described once to the native step, which then runs all layers in one call.

`model/` is the definition of what a step computes, and knows nothing of this: the plan reads the
modules of a decoder, whatever rewrote them, and points at their weights where they lie.

M rows, B sequences, V vocabulary; the other letters are those of `kernels/ops.py`.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels import native, ops
from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_matrix import describe_matrix, why_not_matrix
from jamba_lm.kernels.native_structs import Matrix, RowRounding
from jamba_lm.kernels.packed_weights import Int4Weight, PackedWeight
from jamba_lm.model.attention import AttentionMixer
from jamba_lm.model.block import Block
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.mlp import MLP
from jamba_lm.model.moe import MoE
from jamba_lm.model.norm import NoNorm, RMSNorm
from jamba_lm.native_plan import NativePlan
from jamba_lm.step_description import LayerShape, describe_model

# What the step has no code for; a decoder of anything else runs module by module.
_STATE_DTYPES = (torch.float32, torch.bfloat16)

_VERSION = attrgetter("_version")

# Parameters of two axes that a plan copies, as it does all of one.
COPIED = ("conv_CW", "log_decay_CN")


class StepPlan(NativePlan):
    """One decoder, ready for steps of at most `STEP_ROWS` tokens, and for prompts.

    Results are those of the decoder to rounding: activations stay float32 from the embedding to
    the logits, where modules round them to the model's dtype (a processor that multiplies bfloat16
    has them rounded where they meet such weights, but for the router's), and what a row gives does
    not depend on the other rows of the call.

    The weights are not copied, except vectors (norms, biases, convolution taps, decays), which are
    kept in float32. `is_current` says whether the decoder has been changed since.
    """

    def __init__(self, config: JambaConfig, decoder: Decoder) -> None:
        """Describe `decoder`, which `why_not_plan` has nothing against."""
        super().__init__(
            describe_model(
                config,
                [_shape(cast(Block, block)) for block in decoder.blocks],
                _ModuleWeights(decoder),
                tied=decoder.head is None,
                bfloat16=decoder.final_norm.weight.dtype is torch.bfloat16,
            )
        )
        # Who holds every module, weight and packed weight, under which name.
        self._holders, self._names, self._held = _members(decoder)
        self._parameters = list(decoder.parameters())
        self._places = [x.data_ptr() for x in self._parameters]
        # Those that were copied: matrices are read where they lie, whatever they hold by then.
        # Inference tensors count no versions, and cannot be changed outside inference mode.
        self._copied = [
            x
            for name, x in decoder.named_parameters()
            if (x.dim() == 1 or name.endswith(COPIED)) and not x.is_inference()
        ]
        self._versions = [x._version for x in self._copied]

    @property
    def is_current(self) -> bool:
        """Say whether the decoder's weights are still those that were described."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._held))
            and list(map(Tensor.data_ptr, self._parameters)) == self._places
            and list(map(_VERSION, self._copied)) == self._versions
        )

    @property
    def threads(self) -> int:
        """How many threads the next call is to use: as many as torch does."""
        return torch.get_num_threads()


class _ModuleWeights:
    """The weights of a decoder's modules, where they lie; vectors in copies."""

    def __init__(self, decoder: Decoder) -> None:
        self._modules = dict(decoder.named_modules())

    def matrix(self, name: str) -> Matrix:
        module = self._modules[name]
        bias = getattr(module, "bias", None)
        return describe_matrix(
            _weight(module), bias, rows8=getattr(module, "rows8", RowRounding.NONE)
        )

    def vector(self, name: str) -> Floats | None:
        holder, _, leaf = name.rpartition(".")
        x = getattr(self._modules[holder], leaf, None)
        # A copy, as the description is told when the parameter has changed.
        return None if x is None else x.detach().to(torch.float32, copy=True).contiguous().numpy()


def _shape(block: Block) -> LayerShape:
    feed_forward = block.feed_forward
    experts = len(feed_forward.experts) if isinstance(feed_forward, MoE) else 0
    return LayerShape(isinstance(block.mixer, AttentionMixer), experts)


def _experts(feed_forward: nn.Module) -> list[MLP]:
    if isinstance(feed_forward, MLP):
        return [feed_forward]
    assert isinstance(feed_forward, MoE)
    return [cast(MLP, expert) for expert in feed_forward.experts]


def why_not_plan(decoder: Decoder, backend: str | None) -> str | None:
    """Say why steps of `decoder` cannot be one native call, or None when they can."""
    like = decoder.final_norm.weight
    if like.dtype not in _STATE_DTYPES:
        return f"activations are {like.dtype}, a native step keeps torch.float32 or torch.bfloat16"
    try:
        if ops.choose("selective_scan", like, backend=backend) is not native:
            return "the native back-end does not serve this model"
    except BackendUnavailable as error:
        return str(error)
    for block in decoder.blocks:
        mixer, feed_forward = block.mixer, block.feed_forward
        if not isinstance(mixer, AttentionMixer | MambaMixer):
            return f"a native step knows no mixer {type(mixer).__name__}"
        if not isinstance(feed_forward, MLP | MoE):
            return f"a native step knows no feed-forward {type(feed_forward).__name__}"
        if isinstance(mixer, AttentionMixer):
            if mixer.rope_theta is not None:
                return "a native step has no rotary positions"
            if not _alike(mixer.q_proj, mixer.k_proj, mixer.v_proj):
                return "queries, keys and values are projected by matrices of different types"
        elif not all(
            isinstance(norm, RMSNorm | NoNorm)
            for norm in (mixer.dt_norm, mixer.B_norm, mixer.C_norm)
        ):
            return "a native step knows no such inner norm"
        experts = _experts(feed_forward)
        if not _alike(*(linear for one in experts for linear in (one.gate_proj, one.up_proj))):
            return "gates and up-projections of a layer are of different types"
        if not _alike(*(one.down_proj for one in experts)):
            return "down-projections of a layer are of different types"
    for module in decoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, "weight"):
            weight = module.weight
            reason = None if isinstance(weight, Tensor) and weight.dim() == 1 else _problem(weight)
            if reason is not None:
                return reason
    return None


def _problem(weight: object) -> str | None:
    if not isinstance(weight, Tensor | PackedWeight):
        return f"a native step knows no matrix of {type(weight).__name__}"
    return why_not_matrix(weight)


def _alike(*modules: nn.Module) -> bool:
    # Matrices that meet the same rows share one arrangement of them.
    return len({_kind(_weight(module)) for module in modules}) == 1


def _kind(weight: Tensor | PackedWeight) -> object:
    if isinstance(weight, Tensor):
        return weight.dtype
    return (Int4Weight, weight.group) if isinstance(weight, Int4Weight) else type(weight)


def _weight(module: nn.Module) -> Tensor | PackedWeight:
    weight = module.weight
    assert isinstance(weight, Tensor | PackedWeight)
    return weight


def _members(decoder: Decoder) -> tuple[list[dict[str, Any]], list[str], list[object]]:
    holders: list[dict[str, Any]] = []
    names: list[str] = []
    held: list[object] = []
    for module in decoder.modules():
        packed = {name: one for name, one in vars(module).items() if isinstance(one, PackedWeight)}
        for holder, members in (
            (module._modules, module._modules),
            (module._parameters, module._parameters),
            (vars(module), packed),
        ):
            holders += [holder] * len(members)
            names += members.keys()
            held += members.values()
    return holders, names, held
