"""The selective scan of native/selective_scan.cpp, with its gradients, as a PyTorch function.

Dimension key: M rows of all sequences laid end to end, B sequences, C Mamba channels, N Mamba
state size, K checkpoints: one per 16 tokens of each sequence.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.tensors import address, gradient_is_needed, with_unit_columns

# jamba_scan_call and jamba_scan_backward_call of native/jamba_kernels.h: 8-byte members only.
_FORWARD = struct.Struct("=23q")
_BACKWARD = struct.Struct("=34q")

# JAMBA_CHECKPOINT_TOKENS, _CHANNELS and _STATES: backward recomputes the states between two
# checkpoints, and a checkpoint pads channels and states to whole vectors.
_CHECKPOINT_TOKENS, _CHECKPOINT_CHANNELS, _CHECKPOINT_STATES = 16, 16, 8

# JAMBA_U .. JAMBA_SKIP, in the order of the arguments u, dt, dt_bias, B, C, skip.
_BFLOAT16_BITS = (1, 2, 4, 8, 16, 32)


def selective_scan(
    u_MC: Tensor,
    dt_MC: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    B_MN: Tensor,
    C_MN: Tensor,
    skip_C: Tensor,
    offsets: Tensor,
    state_BCN: Tensor | None = None,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `reference.selective_scan` natively; `path` forces an instruction set, for tests.

    Memory beyond inputs and outputs: about 50 KiB a thread; when a gradient is needed also
    `M * C * N / 16` floats of checkpoints, and while it is computed `3 * C * N` floats and
    256 rows of `2 * N` for each of at most 64 groups of channels.
    """
    code = loaded_library().path_code(path)
    inputs = (
        with_unit_columns(u_MC),
        with_unit_columns(dt_MC),
        dt_bias_C.contiguous(),
        A_CN.to(torch.float32).contiguous(),
        with_unit_columns(B_MN),
        with_unit_columns(C_MN),
        skip_C.contiguous(),
    )
    if state_BCN is not None:
        state_BCN = state_BCN.to(torch.float32).contiguous()
    if gradient_is_needed(*inputs, state_BCN):
        apply = _SelectiveScan.apply
        return apply(*inputs, state_BCN, offsets, code)  # type: ignore[no-untyped-call]
    y_MC, last_state_BCN = _outputs(inputs, offsets)
    call = _pack(inputs, state_BCN, offsets, code, y_MC, last_state_BCN, None)
    loaded_library().call("jamba_selective_scan", _FORWARD.pack(*call))
    return y_MC, last_state_BCN


def _outputs(inputs: tuple[Tensor, ...], offsets: Tensor) -> tuple[Tensor, Tensor]:
    u_MC, A_CN = inputs[0], inputs[3]
    return u_MC.new_empty(u_MC.shape), A_CN.new_empty((offsets.shape[0] - 1, *A_CN.shape))


def _checkpoint_floats(offsets: Tensor, channels: int, states: int) -> int:
    bounds = offsets.tolist()
    count = sum(-((start - end) // _CHECKPOINT_TOKENS) for start, end in pairwise(bounds))
    padded_channels = -(-channels // _CHECKPOINT_CHANNELS) * _CHECKPOINT_CHANNELS
    return count * padded_channels * (-(-states // _CHECKPOINT_STATES) * _CHECKPOINT_STATES)


def _pack(
    inputs: tuple[Tensor, ...],
    state_BCN: Tensor | None,
    offsets: Tensor,
    code: int,
    y_MC: Tensor | None,
    last_state_BCN: Tensor | None,
    checkpoints: Tensor | None,
) -> tuple[int, ...]:
    u_MC, dt_MC, dt_bias_C, A_CN, B_MN, C_MN, skip_C = inputs
    typed = (u_MC, dt_MC, dt_bias_C, B_MN, C_MN, skip_C)
    bfloat16 = 0
    for x, bit in zip(typed, _BFLOAT16_BITS, strict=True):
        if x.dtype is torch.bfloat16:
            bfloat16 |= bit
    rows, channels = u_MC.shape
    return (
        code,
        torch.get_num_threads(),
        bfloat16,
        offsets.shape[0] - 1,
        rows,
        channels,
        A_CN.shape[1],
        offsets.data_ptr(),
        u_MC.data_ptr(),
        u_MC.stride(0),
        dt_MC.data_ptr(),
        dt_MC.stride(0),
        dt_bias_C.data_ptr(),
        A_CN.data_ptr(),
        B_MN.data_ptr(),
        B_MN.stride(0),
        C_MN.data_ptr(),
        C_MN.stride(0),
        skip_C.data_ptr(),
        address(state_BCN),
        address(y_MC),
        address(last_state_BCN),
        address(checkpoints),
    )


class _SelectiveScan(torch.autograd.Function):
    """The scan and its gradients; checkpoints are the only thing saved beyond the inputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, state_BCN, offsets, code = arguments
        A_CN = inputs[3]
        checkpoints = A_CN.new_empty(_checkpoint_floats(offsets, *A_CN.shape))
        y_MC, last_state_BCN = _outputs(tuple(inputs), offsets)
        call = _pack(tuple(inputs), state_BCN, offsets, code, y_MC, last_state_BCN, checkpoints)
        loaded_library().call("jamba_selective_scan", _FORWARD.pack(*call))
        ctx.save_for_backward(*inputs, state_BCN, offsets, checkpoints)
        ctx.code = code
        ctx.set_materialize_grads(False)
        return y_MC, last_state_BCN

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y_MC: Tensor | None, grad_last_state_BCN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, state_BCN, offsets, checkpoints = ctx.saved_tensors
        u_MC, dt_MC, dt_bias_C, A_CN, B_MN, C_MN, skip_C = inputs
        if grad_y_MC is None:
            grad_y_MC = torch.zeros_like(u_MC)
        grad_y_MC = with_unit_columns(grad_y_MC)
        if grad_last_state_BCN is not None:
            grad_last_state_BCN = grad_last_state_BCN.contiguous()
        grad_u_MC = u_MC.new_empty(u_MC.shape)
        grad_dt_MC = dt_MC.new_empty(dt_MC.shape)
        grad_dt_bias_C = A_CN.new_empty(dt_bias_C.shape)
        grad_A_CN = A_CN.new_empty(A_CN.shape)
        grad_B_MN = B_MN.new_empty(B_MN.shape)
        grad_C_MN = C_MN.new_empty(C_MN.shape)
        grad_skip_C = A_CN.new_empty(skip_C.shape)
        grad_state_BCN = None
        if state_BCN is not None and ctx.needs_input_grad[7]:
            grad_state_BCN = state_BCN.new_empty(state_BCN.shape)
        call = (
            *_pack(tuple(inputs), state_BCN, offsets, ctx.code, None, None, checkpoints),
            grad_y_MC.data_ptr(),
            grad_y_MC.stride(0),
            address(grad_last_state_BCN),
            grad_u_MC.data_ptr(),
            grad_dt_MC.data_ptr(),
            grad_dt_bias_C.data_ptr(),
            grad_A_CN.data_ptr(),
            grad_B_MN.data_ptr(),
            grad_C_MN.data_ptr(),
            grad_skip_C.data_ptr(),
            address(grad_state_BCN),
        )
        loaded_library().call("jamba_selective_scan_backward", _BACKWARD.pack(*call))
        return (
            grad_u_MC,
            grad_dt_MC,
            grad_dt_bias_C.to(dt_bias_C.dtype),
            grad_A_CN,
            grad_B_MN,
            grad_C_MN,
            grad_skip_C.to(skip_C.dtype),
            grad_state_BCN,
            None,
            None,
        )
