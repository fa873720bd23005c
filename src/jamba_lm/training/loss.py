"""Cross entropy over a vocabulary, without ever holding all logits.

Knows hidden states, output weights and targets; nothing of models and data.

M rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_lm.data import IGNORED

# Rows whose logits exist at one time: 128 MiB in float32 for a vocabulary of 65,536.
CHUNK_ROWS = 512


def summed_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Return the sum over rows of -log softmax(hidden weight^T)[target], in nats.

    Logits are made for `CHUNK_ROWS` rows at a time, and the gradient with them: nothing of size
    M x V is allocated, and nothing is computed twice. Rows whose target is `data.IGNORED` count
    nothing. The log-softmax is float32 whatever the type of the states.

    Returns:
        A float32 scalar, differentiable in `hidden_MD` and `weight_VD`.
    """
    summed: Tensor = _SummedCrossEntropy.apply(hidden_MD, weight_VD, targets_M)  # type: ignore[no-untyped-call]
    return summed


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        total = hidden_MD.new_zeros((), dtype=torch.float32)
        if wanted:
            hidden_gradient_MD = torch.empty_like(hidden_MD)
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for first in range(0, len(targets_M), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            counted_M1 = (targets_M[rows] != IGNORED)[:, None].float()
            column_M1 = targets_M[rows].clamp_min(0)[:, None]
            # In steps and in place: torch.logsumexp alone takes longer than the three matrix
            # products together.
            scores_MV = (hidden_MD[rows] @ weight_VD.T).float()
            scores_MV -= scores_MV.amax(-1, keepdim=True)
            target_M1 = scores_MV.gather(1, column_M1)
            sum_M1 = scores_MV.exp_().sum(-1, keepdim=True)
            total += (counted_M1 * (sum_M1.log() - target_M1)).sum()
            if wanted:
                # d loss / d logits = softmax - one_hot(target)
                scores_MV *= counted_M1 / sum_M1
                slope_MV = scores_MV.scatter_add_(1, column_M1, -counted_M1).to(weight_VD.dtype)
                hidden_gradient_MD[rows] = slope_MV @ weight_VD
                weight_gradient_VD += slope_MV.T @ hidden_MD[rows]
        if wanted:
            ctx.save_for_backward(hidden_gradient_MD, weight_gradient_VD)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient_MD, weight_gradient_VD = ctx.saved_tensors
        (slope,) = slopes
        return (
            hidden_gradient_MD * slope.to(hidden_gradient_MD.dtype),
            (weight_gradient_VD * slope).to(ctx.weight_dtype),
            None,
        )
