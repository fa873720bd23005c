"""A finished decoder, described once to the native step, which then runs all layers in one call.

`model/` is the definition of what a step computes, and knows nothing of this: the plan reads the
modules of a decoder, whatever rewrote them, and points at their weights where they lie.

M rows, B sequences, V vocabulary; the other letters are those of `kernels/ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels import native, ops
from jamba_lm.kernels.native_matrix import why_not_matrix
from jamba_lm.kernels.native_step import (
    KeyMemory,
    Linear,
    MambaMemory,
    MambaVectors,
    StepLayer,
    StepModel,
    StepSizes,
    run_step,
)
from jamba_lm.kernels.packed_weights import Int4Weight, PackedWeight
from jamba_lm.model.attention import AttentionMixer
from jamba_lm.model.block import Block
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.mlp import MLP
from jamba_lm.model.moe import MoE
from jamba_lm.model.norm import NoNorm, RMSNorm
from jamba_lm.model.state import KeyValueState, LayerState, MambaState, SequenceState

# What the step has no code for; a decoder of anything else runs module by module.
_STATE_DTYPES = (torch.float32, torch.bfloat16)

_VERSION = attrgetter("_version")

# Parameters of two axes that a plan copies, as it does all of one.
COPIED = ("conv_CW", "log_decay_CN")


class StepPlan:
    """One decoder, ready for steps of at most `STEP_ROWS` tokens.

    Results are those of the decoder to rounding: activations stay float32 from the embedding to
    the logits, where modules round them to the model's dtype, and what a row gives does not depend
    on the other rows of the call.

    The weights are not copied, except vectors (norms, biases, convolution taps, decays), which are
    kept in float32. `is_current` says whether the decoder has been changed since.
    """

    def __init__(self, config: JambaConfig, decoder: Decoder) -> None:
        """Describe `decoder`, which `why_not_plan` has nothing against."""
        head = decoder.embedding if decoder.head is None else decoder.head
        self.model = StepModel(
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
            [_layer(cast(Block, block)) for block in decoder.blocks],
            decoder.final_norm.weight,
            _linear(decoder.embedding),
            _linear(head),
            dtype=decoder.final_norm.weight.dtype,
            epsilon=config.norm_eps,
            attention_scale=config.d_head**-0.5,
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

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceState],
        logit_rows: Sequence[int],
        *,
        path: str | None = None,
    ) -> Tensor:
        """Read at most `STEP_ROWS` tokens and return logits, float32 `[len(logit_rows), V]`.

        States move past the tokens together, after the last layer.

        Args:
            sequences: token ids, in range, none of the lists empty.
            states: one each, all different.
            logit_rows: among the rows of all sequences laid end to end.
            path: forces an instruction set, for tests.
        """
        memories, after = plan_memories(states, [len(ids) for ids in sequences])
        offsets = [0]
        for ids in sequences:
            offsets.append(offsets[-1] + len(ids))
        ids_M = [one for ids in sequences for one in ids]
        logits = run_step(self.model, ids_M, offsets, memories, logit_rows, path=path)
        for ids, state, layers in zip(sequences, states, after, strict=True):
            state.advance(layers, ids)
        return logits


def _layer(block: Block) -> StepLayer:
    mixer, feed_forward = block.mixer, block.feed_forward
    if isinstance(mixer, AttentionMixer):
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        mamba = None
    else:
        assert isinstance(mixer, MambaMixer)
        projections = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
        mamba = MambaVectors(
            conv_WC=mixer.conv_CW.t(),
            conv_bias_C=mixer.conv_bias_C,
            dt_norm_R=_gain(mixer.dt_norm),
            B_norm_N=_gain(mixer.B_norm),
            C_norm_N=_gain(mixer.C_norm),
            dt_bias_C=mixer.dt_bias_C,
            A_CN=-mixer.log_decay_CN.detach().exp(),
            skip_C=mixer.skip_C,
        )
    first, second, third, fourth = map(_linear, projections)
    return StepLayer(
        mixer_norm_D=block.mixer_norm.weight,
        feed_forward_norm_D=block.feed_forward_norm.weight,
        projections=(first, second, third, fourth),
        mamba=mamba,
        experts=[
            (_linear(one.gate_proj), _linear(one.up_proj), _linear(one.down_proj))
            for one in _experts(feed_forward)
        ],
        router=_linear(feed_forward.router) if isinstance(feed_forward, MoE) else None,
    )


def _experts(feed_forward: nn.Module) -> list[MLP]:
    if isinstance(feed_forward, MLP):
        return [feed_forward]
    assert isinstance(feed_forward, MoE)
    return [cast(MLP, expert) for expert in feed_forward.experts]


def _linear(module: nn.Module) -> Linear:
    return Linear(
        _weight(module), getattr(module, "bias", None), rows8=getattr(module, "rows8", False)
    )


def _gain(norm: nn.Module) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None


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


def plan_memories(
    states: Sequence[SequenceState], lengths: Sequence[int]
) -> tuple[list[MambaMemory | KeyMemory], list[list[LayerState]]]:
    """Make room for what each of `states` will remember after `lengths` more tokens.

    Returns:
        What the native code reads and writes, layer by layer and within a layer sequence by
        sequence, and the layers of each state after it.
    """
    after = [
        [_layer_after(layer, length) for layer in state.layers]
        for state, length in zip(states, lengths, strict=True)
    ]
    memories = [
        _memory(state.layers[index], layers[index])
        for index in range(len(states[0].layers))
        for state, layers in zip(states, after, strict=True)
    ]
    return memories, after


def _layer_after(layer: LayerState, num_tokens: int) -> LayerState:
    if isinstance(layer, MambaState):
        return MambaState(torch.empty_like(layer.conv_LC), torch.empty_like(layer.scan_CN))
    after = layer.fork()
    after.reserve(num_tokens)
    return after


def _memory(before: LayerState, after: LayerState) -> MambaMemory | KeyMemory:
    if isinstance(before, MambaState) and isinstance(after, MambaState):
        return MambaMemory(before.conv_LC, before.scan_CN, after.conv_LC, after.scan_CN)
    assert isinstance(after, KeyValueState)
    return KeyMemory(after.block_addresses())
