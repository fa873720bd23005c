"""The causal convolution of native/causal_conv.cpp, with its gradients, as a PyTorch function.

Dimension key: M rows of all sequences laid end to end, B sequences, C Mamba channels, W taps,
L = W - 1.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.tensors import address, gradient_is_needed, with_unit_columns

# jamba_conv_call and jamba_conv_backward_call of native/jamba_kernels.h: 8-byte members only.
_FORWARD = struct.Struct("=16q")
_BACKWARD = struct.Struct("=23q")

# JAMBA_U, JAMBA_WEIGHT and JAMBA_BIAS: set where that tensor is bfloat16.
_X_IS_BFLOAT16, _WEIGHT_IS_BFLOAT16, _BIAS_IS_BFLOAT16 = 1, 64, 128


def causal_conv(
    x_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    offsets: Tensor,
    state_BLC: Tensor | None = None,
    *,
    silu: bool,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `reference.causal_conv` natively; `path` forces an instruction set, for tests."""
    code = loaded_library().path_code(path)
    x_MC, weight_CW = with_unit_columns(x_MC), weight_CW.contiguous()
    if bias_C is not None:
        bias_C = bias_C.contiguous()
    if state_BLC is not None:
        state_BLC = state_BLC.contiguous()
    if gradient_is_needed(x_MC, weight_CW, bias_C, state_BLC):
        apply = _CausalConv.apply
        arguments = (x_MC, weight_CW, bias_C, state_BLC, offsets, silu, code)
        return apply(*arguments)  # type: ignore[no-untyped-call]
    return _forward(x_MC, weight_CW, bias_C, state_BLC, offsets, silu, code)


def _forward(
    x_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_BLC: Tensor | None,
    offsets: Tensor,
    silu: bool,
    code: int,
) -> tuple[Tensor, Tensor]:
    y_MC = x_MC.new_empty(x_MC.shape)
    look_back = weight_CW.shape[1] - 1
    last_state_BLC = x_MC.new_empty((offsets.shape[0] - 1, look_back, x_MC.shape[1]))
    call = _pack(x_MC, weight_CW, bias_C, state_BLC, offsets, silu, code, y_MC, last_state_BLC)
    loaded_library().call("jamba_causal_conv", _FORWARD.pack(*call))
    return y_MC, last_state_BLC


def _pack(
    x_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_BLC: Tensor | None,
    offsets: Tensor,
    silu: bool,
    code: int,
    y_MC: Tensor | None,
    last_state_BLC: Tensor | None,
) -> tuple[int, ...]:
    bfloat16 = 0
    if x_MC.dtype is torch.bfloat16:
        bfloat16 |= _X_IS_BFLOAT16
    if weight_CW.dtype is torch.bfloat16:
        bfloat16 |= _WEIGHT_IS_BFLOAT16
    if bias_C is not None and bias_C.dtype is torch.bfloat16:
        bfloat16 |= _BIAS_IS_BFLOAT16
    rows, channels = x_MC.shape
    return (
        code,
        torch.get_num_threads(),
        bfloat16,
        offsets.shape[0] - 1,
        rows,
        channels,
        weight_CW.shape[1],
        silu,
        offsets.data_ptr(),
        x_MC.data_ptr(),
        x_MC.stride(0),
        weight_CW.data_ptr(),
        address(bias_C),
        address(state_BLC),
        address(y_MC),
        address(last_state_BLC),
    )


class _CausalConv(torch.autograd.Function):
    """The convolution and its gradients; nothing is saved beyond the inputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, silu, code = arguments
        ctx.save_for_backward(*tensors)
        ctx.silu, ctx.code = silu, code
        ctx.set_materialize_grads(False)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y_MC: Tensor | None, grad_last_state_BLC: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_MC, weight_CW, bias_C, state_BLC, offsets = ctx.saved_tensors
        if grad_y_MC is None:
            grad_y_MC = torch.zeros_like(x_MC)
        grad_y_MC = with_unit_columns(grad_y_MC)
        if grad_last_state_BLC is not None:
            grad_last_state_BLC = grad_last_state_BLC.contiguous()
        grad_x_MC = x_MC.new_empty(x_MC.shape)
        grad_weight_CW = torch.empty_like(weight_CW, dtype=torch.float32)
        grad_bias_C = torch.empty(weight_CW.shape[:1], dtype=torch.float32)
        grad_state_BLC = None
        if state_BLC is not None and ctx.needs_input_grad[3]:
            grad_state_BLC = state_BLC.new_empty(state_BLC.shape)
        call = (
            *_pack(x_MC, weight_CW, bias_C, state_BLC, offsets, ctx.silu, ctx.code, None, None),
            grad_y_MC.data_ptr(),
            grad_y_MC.stride(0),
            address(grad_last_state_BLC),
            grad_x_MC.data_ptr(),
            grad_weight_CW.data_ptr(),
            grad_bias_C.data_ptr(),
            address(grad_state_BLC),
        )
        loaded_library().call("jamba_causal_conv_backward", _BACKWARD.pack(*call))
        return (
            grad_x_MC,
            grad_weight_CW.to(weight_CW.dtype),
            None if bias_C is None else grad_bias_C.to(bias_C.dtype),
            grad_state_BLC,
            None,
            None,
            None,
        )
