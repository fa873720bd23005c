"""The operations of Jamba, and the one rule that picks who runs them.

It knows no arithmetic: `reference` defines every operation, the other back-ends are faster.

Dimension key: M rows of all sequences laid end to end, B sequences, C Mamba channels,
N Mamba state size, W convolution taps, L = W - 1, H query heads, P width of one head, I inputs and
O outputs of a matrix, V words of a vocabulary or of a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels import native, reference
from jamba_lm.kernels.choice import requested_backend
from jamba_lm.kernels.packed_weights import PackedWeight

# Fastest first. Each module has the operations it lists in OPERATIONS, and `why_not`.
BACKENDS: dict[str, ModuleType] = {"native": native, "reference": reference}


def require(backend: str | None) -> None:
    """Check that the back-end named, by the caller or by JAMBA_BACKEND, can run here at all.

    Raises:
        BackendUnavailable: its name is not known, or it cannot run on this machine.
    """
    name = backend or requested_backend()
    if name is None:
        return
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not("selective_scan")
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")


def choose(op: str, *tensors: Tensor | None, backend: str | None = None) -> ModuleType:
    """Return the module that runs `op` on `tensors`: the one named, else the fastest that can.

    A back-end asked for by name is never silently replaced.

    Raises:
        BackendUnavailable: the back-end named by `backend` or by JAMBA_BACKEND is not known, or
            cannot run `op` here.
    """
    name = backend or requested_backend()
    if name is None:
        return next(module for module in BACKENDS.values() if module.why_not(op, *tensors) is None)
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not(op, *tensors)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {name!r} cannot run: {reason}")
    return BACKENDS[name]


# Shapes are checked here, for every back-end, because native code would read past the end of a
# tensor that is too small. They are ValueError, not JambaError: only our own code can get them
# wrong, and a traceback is then what helps.


def _check_offsets(offsets: Tensor, rows: int) -> None:
    if offsets.dtype is not torch.int64 or not offsets.is_cpu or offsets.dim() != 1:
        raise ValueError(
            f"offsets must be int64 of one axis on the CPU, not {offsets.dtype} of shape "
            f"{tuple(offsets.shape)} on {offsets.device}"
        )
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"offsets must rise strictly from 0 to {rows} rows, not {bounds}")


def _check_shapes(op: str, expected: tuple[object, ...], **tensors: Tensor | None) -> None:
    """Compare the shape of every tensor that is not None with the one expected of it."""
    for (name, x), shape in zip(tensors.items(), expected, strict=True):
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {shape}")


def causal_conv(
    x_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    offsets: Tensor,
    state_BLC: Tensor | None = None,
    *,
    silu: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel causally; see `reference.causal_conv` for the definition."""
    _check_offsets(offsets, x_MC.shape[0])
    channels, width = weight_CW.shape
    sequences = offsets.shape[0] - 1
    _check_shapes(
        "causal_conv",
        ((x_MC.shape[0], channels), (channels,), (sequences, width - 1, channels)),
        x_MC=x_MC,
        bias_C=bias_C,
        state_BLC=state_BLC,
    )
    if state_BLC is not None and state_BLC.dtype is not x_MC.dtype:
        raise ValueError(f"causal_conv: the state is {state_BLC.dtype}, the input {x_MC.dtype}")
    module = choose("causal_conv", x_MC, weight_CW, bias_C, state_BLC, backend=backend)
    return module.causal_conv(x_MC, weight_CW, bias_C, offsets, state_BLC, silu=silu)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the selective recurrence; see `reference.selective_scan` for the definition."""
    rows, (channels, states) = u_MC.shape[0], A_CN.shape
    _check_offsets(offsets, rows)
    by_channel, by_state = (rows, channels), (rows, states)
    _check_shapes(
        "selective_scan",
        (
            by_channel,
            by_channel,
            (channels,),
            by_state,
            by_state,
            (channels,),
            (offsets.shape[0] - 1, channels, states),
        ),
        u_MC=u_MC,
        dt_MC=dt_MC,
        dt_bias_C=dt_bias_C,
        B_MN=B_MN,
        C_MN=C_MN,
        skip_C=skip_C,
        state_BCN=state_BCN,
    )
    inputs = (u_MC, dt_MC, dt_bias_C, A_CN, B_MN, C_MN, skip_C)
    module = choose("selective_scan", *inputs, state_BCN, backend=backend)
    return module.selective_scan(*inputs, offsets, state_BCN)


def attention(
    q_MHP: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    offsets: Tensor,
    scale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend causally to blocks of keys; see `reference.attention` for the definition."""
    module = choose("attention", q_MHP, backend=backend)
    return module.attention(q_MHP, keys, values, offsets, scale)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """Normalise rows by their root mean square; see `reference.rms_norm` for the definition."""
    _check_shapes("rms_norm", (tuple(x.shape[-1:]),), weight_D=weight_D)
    module = choose("rms_norm", x, weight_D, backend=backend)
    return module.rms_norm(x, weight_D, eps)


def silu_gate(x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply `x` by silu(gate); see `reference.silu_gate` for the definition."""
    _check_shapes("silu_gate", (tuple(x.shape),), gate=gate)
    if gate.dtype is not x.dtype:
        raise ValueError(f"silu_gate: the gate is {gate.dtype}, the input {x.dtype}")
    module = choose("silu_gate", x, gate, backend=backend)
    return module.silu_gate(x, gate)


def softmax_sums(scores_MV: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Find what softmaxes divide by; see `reference.softmax_sums` for the definition."""
    _check_scores("softmax_sums", scores_MV)
    return choose("softmax_sums", scores_MV, backend=backend).softmax_sums(scores_MV)


def softmax_slopes_(
    scores_MV: Tensor,
    largest_M: Tensor,
    share_M: Tensor,
    targets_M: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Overwrite scores by slopes; see `reference.softmax_slopes_` for the definition."""
    _check_scores("softmax_slopes_", scores_MV)
    of_rows = ((len(scores_MV),),) * 3
    _check_shapes(
        "softmax_slopes_", of_rows, largest_M=largest_M, share_M=share_M, targets_M=targets_M
    )
    module = choose("softmax_slopes_", scores_MV, largest_M, share_M, backend=backend)
    return module.softmax_slopes_(scores_MV, largest_M, share_M, targets_M)


def _check_scores(op: str, scores_MV: Tensor) -> None:
    if scores_MV.ndim != 2 or scores_MV.shape[1] == 0 or scores_MV.stride(1) != 1:
        raise ValueError(
            f"{op}: the scores are of shape {tuple(scores_MV.shape)} with strides "
            f"{scores_MV.stride()}, expected rows of neighbouring values"
        )


def packed_linear(
    x_MI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply by a packed matrix; see `reference.packed_linear` for the definition."""
    outputs, inputs = weight.shape
    _check_shapes("packed_linear", ((x_MI.shape[0], inputs), (outputs,)), x_MI=x_MI, bias_O=bias_O)
    if weight.device != x_MI.device:
        raise ValueError(
            f"packed_linear: the weight is on {weight.device}, the input on {x_MI.device}"
        )
    # The types of the weight's own tensors are its class's promise: only the others are asked.
    module = choose("packed_linear", x_MI, bias_O, backend=backend)
    return module.packed_linear(x_MI, weight, bias_O)
