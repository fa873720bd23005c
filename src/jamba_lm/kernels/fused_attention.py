"""Attention by torch's scaled_dot_product_attention, which never writes scores to memory.

Dimension key: M rows of all sequences laid end to end, T tokens of one sequence, S tokens
remembered plus T, H query heads, G key/value heads, P width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

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
