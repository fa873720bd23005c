"""Cross entropy over a vocabulary, without ever holding all logits.

Knows hidden states, output weights and targets; nothing of models and data.

M rows, D model width, V vocabulary, or the part of it that is held here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jamba_lm.data import IGNORED
from jamba_lm.kernels import ops

# Rows whose logits exist at one time: 128 MiB in float32 for a vocabulary of 65,536.
CHUNK_ROWS = 512


Join = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Takes, by row and over the part of the vocabulary here, the largest logit, the sum of
exp(logit - largest) and the target's logit (zero where another part has the target); returns the
three over the whole vocabulary."""


def _alone(largest_M: Tensor, sum_M: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return largest_M, sum_M, target_M


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """Which part of the vocabulary the output weights are of.

    Attributes:
        first: the token of the first row.
        join: puts parts together.
    """

    first: int = 0
    join: Join = _alone


WHOLE = VocabularyPart()


@dataclass(frozen=True, slots=True)
class SummedLosses:
    """Sums over the rows that predict something, float32 scalars.

    Attributes:
        total: cross entropy plus coefficient times squares; the only one with a gradient.
        entropy: -log softmax[target], in nats.
        squares: (log sum exp of the logits)^2.
    """

    total: Tensor
    entropy: Tensor
    squares: Tensor


def summed_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Return the sum over rows of -log softmax(hidden weight^T)[target], in nats.

    See `summed_losses`.
    """
    return summed_losses(hidden_MD, weight_VD, targets_M).total


def summed_losses(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    z_coef: float = 0.0,
    part: VocabularyPart = WHOLE,
) -> SummedLosses:
    """Return the summed cross entropy of softmax(hidden weight^T), and the z-loss beside it.

    Logits are made for `CHUNK_ROWS` rows at a time, and the gradient with them: nothing of size
    M x V is allocated, and nothing is computed twice. Rows whose target is `data.IGNORED` count
    nothing. The log-softmax is float32 whatever the type of the states.

    Args:
        hidden_MD: final hidden states.
        weight_VD: what turns them into logits.
        targets_M: the token to predict. Where most rows predict nothing, as in answers behind long
            prompts, no logits are made for these.
        z_coef: of the squares, which keep the softmax's normaliser near one.
        part: of the vocabulary, when `weight_VD` is not all of it.

    Returns:
        `total` is differentiable in `hidden_MD` and `weight_VD`; with a part, the gradient of the
        states is this part's share of it.

    Source: z-loss: PaLM (arXiv 2204.02311), §5.
    """
    counted = targets_M != IGNORED
    if 2 * int(counted.sum()) < len(targets_M):
        hidden_MD, targets_M = hidden_MD[counted], targets_M[counted]
    apply = _SummedLosses.apply
    sums = apply(hidden_MD, weight_VD, targets_M, z_coef, part)  # type: ignore[no-untyped-call]
    return SummedLosses(*sums)


class _SummedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        z_coef: float,
        part: VocabularyPart,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted, weight_wanted = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        entropy = hidden_MD.new_zeros((), dtype=torch.float32)
        squares = hidden_MD.new_zeros((), dtype=torch.float32)
        if wanted:
            hidden_gradient_MD = torch.empty_like(hidden_MD)
            # A frozen output matrix needs none, and saves a third of the products here.
            num_rows = len(weight_VD) if weight_wanted else 0
            weight_gradient_VD = torch.zeros(
                num_rows, weight_VD.shape[1], dtype=torch.float32, device=weight_VD.device
            )
        last_column = len(weight_VD) - 1
        for first in range(0, len(targets_M), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            counted_M = (targets_M[rows] != IGNORED).float()
            column_M = targets_M[rows] - part.first
            here_M = ((column_M >= 0) & (column_M <= last_column)).float()
            scores_MV = hidden_MD[rows] @ weight_VD.T
            target_M = scores_MV.gather(1, column_M.clamp(0, last_column)[:, None])[:, 0].float()
            largest_M, sum_M, target_M = part.join(*ops.softmax_sums(scores_MV), here_M * target_M)
            z_M = sum_M.log() + largest_M
            entropy += (counted_M * (z_M - target_M)).sum()
            squares += (counted_M * z_M.square()).sum()
            if wanted:
                # d entropy / d logits = softmax - one_hot(target), and d z^2 = 2 z softmax
                share_M = counted_M / sum_M
                if z_coef:
                    share_M *= 1.0 + 2.0 * z_coef * z_M
                slope_MV = ops.softmax_slopes_(scores_MV, largest_M, share_M, column_M)
                hidden_gradient_MD[rows] = slope_MV @ weight_VD
                if weight_wanted:
                    weight_gradient_VD += slope_MV.T @ hidden_MD[rows]
        if wanted:
            ctx.save_for_backward(hidden_gradient_MD, weight_gradient_VD)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(entropy, squares)
        # A tensor of its own: what is returned twice would be one output.
        return entropy + z_coef * squares, entropy, squares

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_MD, weight_gradient_VD = ctx.saved_tensors
        slope = slopes[0]
        return (
            hidden_gradient_MD * slope.to(hidden_gradient_MD.dtype),
            (weight_gradient_VD * slope).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )
