"""Attention by torch's scaled_dot_product_attention, which never writes scores to memory.

Dimension key: M rows of all sequences laid end to end, T tokens of one sequence, S tokens
remembered plus T, H query heads, G key/value heads, P width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A mask of queries x keys never holds more values than this: 1 MiB of booleans.
MASK_VALUES = 1 << 20


def attention(
    q_MHP: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    offsets: Tensor,
    scale: float,
) -> Tensor:
    """Compute `reference.attention` without materialising its scores."""
    bounds = offsets.tolist()
    outputs = [
        _attend(q_MHP[start:end], _joined(keys[b]), _joined(values[b]), scale)
        for b, (start, end) in enumerate(pairwise(bounds))
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _attend(q_THP: Tensor, k_SGP: Tensor, v_SGP: Tensor, scale: float) -> Tensor:
    """Attend for one sequence, choosing a form that needs no large mask."""
    tokens, heads, head_width = q_THP.shape
    positions, groups, _ = k_SGP.shape
    k_GSP, v_GSP = k_SGP.transpose(0, 1), v_SGP.transpose(0, 1)
    if tokens == 1:
        # One query sees everything, so the heads of a group can be the rows of one product:
        # keys are read once per group, not once per head.
        q = q_THP.reshape(1, groups, heads // groups, head_width)
        y = F.scaled_dot_product_attention(q, k_GSP[None], v_GSP[None], scale=scale)
        return y.reshape(1, heads, head_width)
    q_HTP = q_THP.transpose(0, 1)
    if tokens == positions:
        y_HTP = F.scaled_dot_product_attention(
            q_HTP[None], k_GSP[None], v_GSP[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
        return y_HTP.transpose(0, 1).contiguous()
    past = positions - tokens
    if _flash_takes(q_THP):
        y_THP: Tensor = _PastAndOwn.apply(q_THP, k_SGP, v_SGP, scale)  # type: ignore[no-untyped-call]
        return y_THP
    block = max(1, MASK_VALUES // positions)
    outputs = []
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        seen = past + last
        query = torch.arange(past + first, seen, device=q_THP.device)
        mask = query[:, None] >= torch.arange(seen, device=q_THP.device)
        y_HTP = F.scaled_dot_product_attention(
            q_HTP[None, :, first:last],
            k_GSP[None, :, :seen],
            v_GSP[None, :, :seen],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0]
        outputs.append(y_HTP.transpose(0, 1))
    return torch.cat(outputs)


def _flash_takes(q_THP: Tensor) -> bool:
    return q_THP.device.type == "cpu" and q_THP.dtype in (torch.float32, torch.bfloat16)


class _PastAndOwn(torch.autograd.Function):
    """Attention of T queries to S > T keys: to all of the past, and causally to their own.

    A mask of T x S would be read as often as the keys; without one, each of the two parts is what
    torch's kernel computes anyway. Their results are weighed by the sums that each divided by. On
    the way back each part is given the sum over both, so that its weights are those of the whole.

    Source: Liu et al., Ring Attention (arXiv 2310.01889); FlashAttention-2 (arXiv 2307.08691) §3.1.
    """

    @staticmethod
    def forward(ctx: Any, q_THP: Tensor, k_SGP: Tensor, v_SGP: Tensor, scale: float) -> Tensor:
        past = k_SGP.shape[0] - q_THP.shape[0]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q_past, q_own = _as_groups(q_THP, k_SGP.shape[1]), _heads_first(q_THP)
        k, v = _heads_first(k_SGP), _heads_first(v_SGP)
        k_own, v_own = (_spread(x[:, :, past:], q_own.shape[1]) for x in (k, v))
        # The past is seen by every query alike, so the heads of a group are rows of one product.
        y_past, sum_past = flash(q_past, k[:, :, :past], v[:, :, :past], 0.0, False, scale=scale)
        y_own, sum_own = flash(q_own, k_own, v_own, 0.0, True, scale=scale)
        sum_past = sum_past.reshape(sum_own.shape)
        whole = torch.logaddexp(sum_past, sum_own)
        y = y_past.reshape(y_own.shape).float() * (sum_past - whole).exp()[..., None]
        y = (y + y_own.float() * (sum_own - whole).exp()[..., None]).to(q_THP.dtype)
        ctx.save_for_backward(q_THP, k_SGP, v_SGP, y, whole)
        ctx.scale = scale
        return y[0].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_THP: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THP, k_SGP, v_SGP, y, whole = ctx.saved_tensors
        heads, groups = q_THP.shape[1], k_SGP.shape[1]
        past = k_SGP.shape[0] - q_THP.shape[0]
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        slope = _heads_first(slope_THP)
        k_own, v_own = (_spread(_heads_first(x[past:]), heads) for x in (k_SGP, v_SGP))
        dq, dk_own, dv_own = back(
            slope, _heads_first(q_THP), k_own, v_own, y, whole, 0.0, True, scale=ctx.scale
        )
        dk_SGP, dv_SGP = torch.empty_like(k_SGP), torch.empty_like(v_SGP)
        dk_SGP[past:] = _summed(dk_own, groups)[0].transpose(0, 1)
        dv_SGP[past:] = _summed(dv_own, groups)[0].transpose(0, 1)
        grouped = (1, groups, -1, q_THP.shape[2])
        rows = [slope.reshape(grouped), _as_groups(q_THP, groups), y.reshape(grouped)]
        # In float32, since every piece of the past adds to it.
        dq = dq.reshape(grouped).float()
        for first, side, size in _pieces(past, groups):
            piece = slice(first, first + side * size)
            slopes, queries, results = (x.expand(side, -1, -1, -1) for x in rows)
            keys, values, dk, dv = (
                x[piece].unflatten(0, (side, size)).transpose(1, 2)
                for x in (k_SGP, v_SGP, dk_SGP, dv_SGP)
            )
            sums = whole.reshape(1, groups, -1).expand(side, -1, -1)
            dq_piece, dk_piece, dv_piece = back(
                slopes, queries, keys, values, results, sums, 0.0, False, scale=ctx.scale
            )
            dq += dq_piece.float().sum(0)
            dk.copy_(dk_piece)
            dv.copy_(dv_piece)
        dq_HTP = dq.to(q_THP.dtype).reshape(slope.shape)[0]
        return dq_HTP.transpose(0, 1), dk_SGP, dv_SGP, None


def _pieces(past: int, groups: int) -> list[tuple[int, int, int]]:
    """Cut keys into pieces that pass for sequences, so that every thread has one.

    On the way back torch's kernel shares out nothing but sequences and heads. A million keys of a
    single head took it 19.7 s at once, and 8.1 s as two pieces.

    Returns:
        The first key, how many pieces are side by side, and how long each of them is.
    """
    side = -(-torch.get_num_threads() // groups)
    left = past % side
    cuts = [(0, side, past // side), (past - left, 1, left)]
    return [(first, pieces, size) for first, pieces, size in cuts if size]


def _heads_first(x_THP: Tensor) -> Tensor:
    return x_THP.transpose(0, 1)[None]


def _as_groups(q_THP: Tensor, groups: int) -> Tensor:
    """Lay the queries of the heads of a group end to end: [1, G, H / G * T, P]."""
    return _heads_first(q_THP).reshape(1, groups, -1, q_THP.shape[2])


def _spread(x_1GTP: Tensor, heads: int) -> Tensor:
    """Repeat the keys or values of each group for its heads: [1, H, T, P]."""
    groups = x_1GTP.shape[1]
    return x_1GTP if groups == heads else x_1GTP.repeat_interleave(heads // groups, dim=1)


def _summed(slope_1HTP: Tensor, groups: int) -> Tensor:
    """Add up what the heads of a group say of its keys or values: [1, G, T, P]."""
    if slope_1HTP.shape[1] == groups:
        return slope_1HTP
    return slope_1HTP.unflatten(1, (groups, -1)).float().sum(2).to(slope_1HTP.dtype)
