"""The row operations of native/row_ops.cpp, with their gradients, as PyTorch functions.

Dimension key: M rows, whatever the leading axes were; D values of a row.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.tensors import gradient_is_needed, with_unit_columns

# The structs of native/jamba_kernels.h: 8-byte members only.
_NORM = struct.Struct("=8qd2q")
_NORM_BACKWARD = struct.Struct("=8qd2q4q")
_GATE = struct.Struct("=10q")
_GATE_BACKWARD = struct.Struct("=14q")

# JAMBA_U and JAMBA_WEIGHT: set where that tensor is bfloat16.
_X_IS_BFLOAT16, _WEIGHT_IS_BFLOAT16 = 1, 64


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """Run `reference.rms_norm` natively; `path` forces an instruction set, for tests."""
    code = loaded_library().path_code(path)
    x_MD, weight_D = _rows(x), weight_D.contiguous()
    if gradient_is_needed(x, weight_D):
        y_MD, _ = _RMSNorm.apply(x_MD, weight_D, eps, code)  # type: ignore[no-untyped-call]
    else:
        y_MD, _ = _norm(x_MD, weight_D, eps, code)
    return y_MD.view(x.shape)


def silu_gate(x: Tensor, gate: Tensor, *, path: str | None = None) -> Tensor:
    """Run `reference.silu_gate` natively; `path` forces an instruction set, for tests."""
    code = loaded_library().path_code(path)
    run = _SiLUGate.apply if gradient_is_needed(x, gate) else _gate
    return run(_rows(x), _rows(gate), code).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return with_unit_columns(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


def _norm(x_MD: Tensor, weight_D: Tensor, eps: float, code: int) -> tuple[Tensor, Tensor]:
    y_MD = x_MD.new_empty(x_MD.shape)
    inverse_M = torch.empty(x_MD.shape[:1], dtype=torch.float32)
    if len(x_MD):
        call = _pack_norm(x_MD, weight_D, eps, code, y_MD, inverse_M)
        loaded_library().call("jamba_norm", _NORM.pack(*call))
    return y_MD, inverse_M


def _pack_norm(
    x_MD: Tensor, weight_D: Tensor, eps: float, code: int, y_MD: Tensor, inverse_M: Tensor
) -> tuple[int | float, ...]:
    bfloat16 = _X_IS_BFLOAT16 if x_MD.dtype is torch.bfloat16 else 0
    if weight_D.dtype is torch.bfloat16:
        bfloat16 |= _WEIGHT_IS_BFLOAT16
    return (
        code,
        torch.get_num_threads(),
        bfloat16,
        *x_MD.shape,
        x_MD.data_ptr(),
        x_MD.stride(0),
        weight_D.data_ptr(),
        eps,
        y_MD.data_ptr(),
        inverse_M.data_ptr(),
    )


class _RMSNorm(torch.autograd.Function):
    """The norm and its gradients; one float32 per row is saved beyond the inputs."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float, code: int
    ) -> tuple[Tensor, Tensor]:
        y_MD, inverse_M = _norm(x_MD, weight_D, eps, code)
        ctx.save_for_backward(x_MD, weight_D, inverse_M)
        ctx.mark_non_differentiable(inverse_M)
        ctx.eps, ctx.code = eps, code
        return y_MD, inverse_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_MD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weight_D, inverse_M = ctx.saved_tensors
        grad_y_MD = with_unit_columns(grad_y_MD)
        grad_x_MD = x_MD.new_empty(x_MD.shape)
        grad_weight_D = torch.zeros(weight_D.shape, dtype=torch.float32)
        if len(x_MD):
            call = (
                *_pack_norm(x_MD, weight_D, ctx.eps, ctx.code, grad_x_MD, inverse_M),
                grad_y_MD.data_ptr(),
                grad_y_MD.stride(0),
                grad_x_MD.data_ptr(),
                grad_weight_D.data_ptr(),
            )
            loaded_library().call("jamba_norm_backward", _NORM_BACKWARD.pack(*call))
        return grad_x_MD, grad_weight_D.to(weight_D.dtype), None, None


def _gate(x_MD: Tensor, gate_MD: Tensor, code: int) -> Tensor:
    y_MD = x_MD.new_empty(x_MD.shape)
    if len(x_MD):
        loaded_library().call("jamba_gate", _GATE.pack(*_pack_gate(x_MD, gate_MD, code, y_MD)))
    return y_MD


def _pack_gate(x_MD: Tensor, gate_MD: Tensor, code: int, y_MD: Tensor) -> tuple[int, ...]:
    return (
        code,
        torch.get_num_threads(),
        _X_IS_BFLOAT16 if x_MD.dtype is torch.bfloat16 else 0,
        *x_MD.shape,
        x_MD.data_ptr(),
        x_MD.stride(0),
        gate_MD.data_ptr(),
        gate_MD.stride(0),
        y_MD.data_ptr(),
    )


class _SiLUGate(torch.autograd.Function):
    """The gate and its gradients; nothing is saved beyond the inputs."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gate_MD: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(x_MD, gate_MD)
        ctx.code = code
        return _gate(x_MD, gate_MD, code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_MD = ctx.saved_tensors
        grad_y_MD = with_unit_columns(grad_y_MD)
        grad_x_MD, grad_gate_MD = x_MD.new_empty(x_MD.shape), x_MD.new_empty(x_MD.shape)
        if len(x_MD):
            call = (
                *_pack_gate(x_MD, gate_MD, ctx.code, grad_x_MD),
                grad_y_MD.data_ptr(),
                grad_y_MD.stride(0),
                grad_x_MD.data_ptr(),
                grad_gate_MD.data_ptr(),
            )
            loaded_library().call("jamba_gate_backward", _GATE_BACKWARD.pack(*call))
        return grad_x_MD, grad_gate_MD, None
