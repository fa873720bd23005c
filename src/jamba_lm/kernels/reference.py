"""The definition of every operation, in plain PyTorch: what the fast back-ends must agree with.

It knows nothing of speed beyond not being wasteful; autograd differentiates it, on any device.

Dimension key: M rows of all sequences laid end to end, B sequences, T tokens of one sequence,
S tokens remembered plus T, C Mamba channels, N Mamba state size, W convolution taps, L = W - 1,
H query heads, G key/value heads, P width of one head, I inputs and O outputs of a matrix,
V words of a vocabulary or of a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.kernels.packed_weights import PackedWeight, row_blocks

OPERATIONS = frozenset(
    {
        *("causal_conv", "selective_scan", "attention", "rms_norm", "silu_gate", "packed_linear"),
        *("softmax_sums", "softmax_slopes_"),
    }
)

# Attention scores, heads x queries x keys, are never more than this at once: 16 MiB.
SCORES = 1 << 22


def why_not(op: str, *tensors: Tensor | None) -> str | None:
    """Say why `op` cannot run here on `tensors`: the reference always can."""
    return None if op in OPERATIONS else f"the reference has no operation {op!r}"


def method(op: str) -> str:
    """Say how `op` is computed here, for a person."""
    return "plain PyTorch"


def causal_conv(
    x_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    offsets: Tensor,
    state_BLC: Tensor | None = None,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own `W` taps, looking back only.

        y_t = silu(bias + sum_w weight[w] x_{t - L + w})

    Sums are float32 and rounded once, after the activation.

    Paper: Mamba §3.4, Figure 3 (the short convolution before the scan).

    Args:
        x_MC: inputs of all sequences, end to end.
        weight_CW: taps, oldest input first.
        bias_C: added before the activation; none when None.
        offsets: int64 `[B + 1]` on the CPU; sequence b is rows `offsets[b]:offsets[b + 1]`.
        state_BLC: the L inputs before each sequence, oldest first; zeros when None.
        silu: apply SiLU to the result.

    Returns:
        y_MC, and the last L inputs of each sequence, both in the dtype of `x_MC`.
    """
    width = weight_CW.shape[1]
    wide = torch.promote_types(x_MC.dtype, torch.float32)
    bounds = offsets.tolist()
    weight_WC = weight_CW.to(wide).t()
    outputs, states = [], []
    for b, (start, end) in enumerate(pairwise(bounds)):
        before_LC = x_MC.new_zeros(width - 1, x_MC.shape[1]) if state_BLC is None else state_BLC[b]
        # Both the window that is convolved and the source of the next state: L rows, then T.
        window = torch.cat([before_LC, x_MC[start:end]])
        taps = window.to(wide)
        length = end - start
        y_TC = taps[:length] * weight_WC[0]
        for w in range(1, width):
            y_TC = y_TC + taps[w : w + length] * weight_WC[w]
        outputs.append(y_TC)
        states.append(window[length:])
    y_MC = torch.cat(outputs)
    if bias_C is not None:
        y_MC = y_MC + bias_C.to(wide)
    if silu:
        y_MC = F.silu(y_MC)
    return y_MC.to(x_MC.dtype), torch.stack(states)


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
) -> tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence over each sequence, continuing from a state.

        dt_t = softplus(dt_t + dt_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = C_t h_t + skip u_t

    Calling it once on a sequence, or on any split of the sequence while passing the
    state along, gives the same outputs and the same last state.

    Paper: Mamba, Algorithm 2 and eq. 2a-2b (A by zero-order hold, B by Euler).

    Args:
        u_MC: inputs of all sequences, end to end; any float dtype.
        dt_MC: step sizes before bias and softplus; any float dtype.
        dt_bias_C: added to the step sizes in float32.
        A_CN: continuous-time decay, negative, float32 (float64 computes all in float64).
        B_MN: input projection, one per token.
        C_MN: output projection, one per token.
        skip_C: the paper's D.
        offsets: int64 `[B + 1]` on the CPU; sequence b is rows `offsets[b]:offsets[b + 1]`.
        state_BCN: state to continue from, float32; zeros when None.

    Returns:
        y_MC in the dtype of `u_MC`, and the state after each sequence's last token in float32.
    """
    wide = torch.promote_types(A_CN.dtype, torch.float32)
    bounds = offsets.tolist()
    u_wide, skip = u_MC.to(wide), skip_C.to(wide)
    step = F.softplus(dt_MC.to(wide) + dt_bias_C.to(wide))
    scaled = step * u_wide
    outputs, states = [], []
    for b, (start, end) in enumerate(pairwise(bounds)):
        h_CN = A_CN.new_zeros(A_CN.shape) if state_BCN is None else state_BCN[b].to(wide)
        # Taking the rows apart at once keeps autograd linear in T; indexing row by row would not.
        rows = zip(
            step[start:end].unbind(0),
            scaled[start:end].unbind(0),
            B_MN[start:end].to(wide).unbind(0),
            C_MN[start:end].to(wide).unbind(0),
            strict=True,
        )
        for dt_C, scaled_C, B_N, C_N in rows:
            h_CN = torch.exp(dt_C[:, None] * A_CN) * h_CN + scaled_C[:, None] * B_N
            outputs.append(h_CN @ C_N)
        states.append(h_CN)
    y_MC = torch.stack(outputs) + skip * u_wide
    return y_MC.to(u_MC.dtype), torch.stack(states)


def attention(
    q_MHP: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    offsets: Tensor,
    scale: float,
) -> Tensor:
    """Attend causally from the last T of each sequence's S positions to all of them.

    Query heads share key/value heads in groups of H / G neighbours. Softmax is float32.

    Paper: Jamba §2 (grouped-query attention, no positions); GQA, Ainslie et al. 2023.

    Args:
        q_MHP: queries of all sequences, end to end.
        keys: for each sequence its consecutive blocks `[S_j, G, P]`, S in all, the T new included.
        values: likewise.
        offsets: int64 `[B + 1]` on the CPU; sequence b is rows `offsets[b]:offsets[b + 1]`.
        scale: multiplies the products of queries and keys, usually `P ** -0.5`.

    Returns:
        The attended values, `[M, H, P]`, in the dtype of `q_MHP`.
    """
    bounds = offsets.tolist()
    outputs = []
    for b, (start, end) in enumerate(pairwise(bounds)):
        k_SGP, v_SGP = torch.cat(list(keys[b])), torch.cat(list(values[b]))
        past = k_SGP.shape[0] - (end - start)
        block = max(1, SCORES // (q_MHP.shape[1] * k_SGP.shape[0]))
        for first in range(start, end, block):
            last = min(first + block, end)
            seen = past + last - start
            outputs.append(_attend(q_MHP[first:last], k_SGP[:seen], v_SGP[:seen], scale))
    return torch.cat(outputs).to(q_MHP.dtype)


def _attend(q_THP: Tensor, k_SGP: Tensor, v_SGP: Tensor, scale: float) -> Tensor:
    """Attend from the last T of S positions, by the textbook, in float32 or wider."""
    tokens, heads, head_width = q_THP.shape
    positions, groups, _ = k_SGP.shape
    wide = torch.promote_types(q_THP.dtype, torch.float32)
    q = q_THP.to(wide).reshape(tokens, groups, heads // groups, head_width)
    scores = torch.einsum("tgrp,sgp->grts", q, k_SGP.to(wide)) * scale
    query = torch.arange(positions - tokens, positions, device=q_THP.device)
    hidden = query[:, None] < torch.arange(positions, device=q_THP.device)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("grts,sgp->tgrp", weights, v_SGP.to(wide)).reshape(q_THP.shape)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis, then multiply by a learned gain.

    The statistics and the division are in float32. The quotient is rounded to the dtype of `x`
    *before* the gain is applied: `torch.nn.RMSNorm` rounds only after it, which gives other
    values in bfloat16.

    Source: transformers `JambaRMSNorm`.

    Args:
        x: any shape (..., D).
        weight_D: the gain, in the dtype of `x`.
        eps: added to the mean of the squares.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight_D


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply `x` by silu(gate) = gate * sigmoid(gate), in float32, rounded once.

    Paper: Mamba Figure 3 (the gate of the block); GLU Variants, eq. 6 (SwiGLU).

    Args:
        x: any shape.
        gate: the shape and dtype of `x`.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * F.silu(gate.to(wide))).to(x.dtype)


def softmax_sums(scores_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a softmax over each row divides by, without writing anything of its size.

        largest_m = max_v scores_mv,   sum_m = sum_v exp(scores_mv - largest_m)

    A row with a NaN gets one as its sum.

    Args:
        scores_MV: any float dtype, V > 0.

    Returns:
        (largest_M, sum_M), float32, or float64 of float64 scores.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    wide_MV = scores_MV.to(torch.promote_types(scores_MV.dtype, torch.float32))
    largest_M = wide_MV.amax(-1)
    return largest_M, (wide_MV - largest_M[:, None]).exp().sum(-1)


def softmax_slopes_(
    scores_MV: Tensor, largest_M: Tensor, share_M: Tensor, targets_M: Tensor
) -> Tensor:
    """Write the slope of a cross entropy over the scores that it is of.

        scores_mv <- exp(scores_mv - largest_m) share_m - (1 where v is target_m)

    Each slope is computed in float32 and rounded once.

    Args:
        scores_MV: any float dtype; overwritten.
        largest_M: of the whole row, see `softmax_sums`; no score may be larger.
        share_M: 1 / sum of a row that counts, 0 of one that does not, with whatever else the
            softmax is to be multiplied by.
        targets_M: columns, int64. One outside of 0 to V - 1 is subtracted nowhere.

    Returns:
        `scores_MV`.
    """
    wide_MV = scores_MV.to(torch.promote_types(scores_MV.dtype, torch.float32))
    wide_MV = (wide_MV - largest_M[:, None]).exp() * share_M[:, None]
    here_M = ((targets_M >= 0) & (targets_M < scores_MV.shape[1]))[:, None]
    column_M1 = targets_M[:, None].clamp(0, scores_MV.shape[1] - 1)
    wide_MV.scatter_add_(1, column_M1, -here_M.to(wide_MV.dtype))
    return scores_MV.copy_(wide_MV)


def packed_linear(x_MI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Multiply by the transpose of a packed matrix, and add a bias.

        y = x W^T + bias, with W as `weight.dequantize()` gives it

    The matrix is turned into float32 a block of rows at a time, products and sums are float32, and
    the result is rounded once. Activations are not rounded to integers.

    Args:
        x_MI: any float dtype.
        weight: the matrix of I inputs and O outputs.
        bias_O: any float dtype; none when None.

    Returns:
        y_MO in the dtype of `x_MI`.
    """
    wide = torch.promote_types(x_MI.dtype, torch.float32)
    x_wide = x_MI.to(wide)
    parts = [
        x_wide @ weight.rows(first, end).dequantize(wide).t()
        for first, end in row_blocks(*weight.shape)
    ]
    y_MO = torch.cat(parts, dim=-1)
    if bias_O is not None:
        y_MO = y_MO + bias_O.to(wide)
    return y_MO.to(x_MI.dtype)
