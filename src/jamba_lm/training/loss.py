"""Cross entropy over a vocabulary, without ever holding all logits.

Knows hidden states, output weights and targets; nothing of models and data.

M rows, D model width, K inputs of any product, V vocabulary, or the part of it that is held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jamba_lm.data import IGNORED
from jamba_lm.kernels import ops

# Rows whose logits exist at one time: 128 MiB in bfloat16 for a vocabulary of 65,536.
CHUNK_ROWS = 1024

# Rows of a weight's gradient that are added up, or scaled and rounded, at a time: what lies between
# two of these operations stays in the cache.
WEIGHT_ROWS = 2048

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


class Product(NamedTuple):
    """A summand of the logits: states weight^T.

    Attributes:
        states_MK: made from the hidden states.
        weight_VK: what turns them into logits.
    """

    states_MK: Tensor
    weight_VK: Tensor


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
    more: Sequence[Product] = (),
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
        more: what is added to hidden weight^T, as an adapter beside the output weights does.

    Returns:
        `total` is differentiable once in `hidden_MD`, `weight_VD` and `more`; with a part, the
        gradient of the states is this part's share of it.

    Raises:
        RuntimeError: by a second backward pass through the same result.

    Source: z-loss: PaLM (arXiv 2204.02311), §5.
    """
    counted = targets_M != IGNORED
    products = [Product(hidden_MD, weight_VD), *more]
    if 2 * int(counted.sum()) < len(targets_M):
        products = [Product(states[counted], weight) for states, weight in products]
        targets_M = targets_M[counted]
    apply, tensors = _SummedLosses.apply, chain.from_iterable(products)
    sums = apply(targets_M, z_coef, part, *tensors)  # type: ignore[no-untyped-call]
    return SummedLosses(*sums)


class _SummedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets_M: Tensor,
        z_coef: float,
        part: VocabularyPart,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        products = [Product(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
        entropy = targets_M.new_zeros((), dtype=torch.float32)
        squares = targets_M.new_zeros((), dtype=torch.float32)
        sums = _Gradients(products, ctx.needs_input_grad[3:])
        last_column = len(products[0].weight_VK) - 1
        for first in range(0, len(targets_M), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            counted_M = (targets_M[rows] != IGNORED).float()
            column_M = targets_M[rows] - part.first
            here_M = ((column_M >= 0) & (column_M <= last_column)).float()
            scores_MV = _logits(products, rows)
            target_M = scores_MV.gather(1, column_M.clamp(0, last_column)[:, None])[:, 0].float()
            largest_M, sum_M, target_M = part.join(*ops.softmax_sums(scores_MV), here_M * target_M)
            z_M = sum_M.log() + largest_M
            entropy += (counted_M * (z_M - target_M)).sum()
            squares += (counted_M * z_M.square()).sum()
            if sums.wanted:
                # d entropy / d logits = softmax - one_hot(target), and d z^2 = 2 z softmax
                share_M = counted_M / sum_M
                if z_coef:
                    share_M *= 1.0 + 2.0 * z_coef * z_M
                sums.add(ops.softmax_slopes_(scores_MV, largest_M, share_M, column_M), rows)
        # No saved tensors: autograd would keep these, and whoever gets them would have to copy.
        ctx.found, ctx.dtypes = sums.found, [one.dtype for one in tensors]
        ctx.mark_non_differentiable(entropy, squares)
        # A tensor of its own: what is returned twice would be one output.
        return entropy + z_coef * squares, entropy, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError(
                "the gradient of this loss was given away by an earlier backward pass; "
                "compute the loss again"
            )
        found: list[Tensor | None] = ctx.found
        ctx.found = None
        for number, (one, dtype) in enumerate(zip(found, ctx.dtypes, strict=True)):
            if one is not None:
                found[number] = _scaled(one, slopes[0], dtype)
        return None, None, None, *found


def _scaled(gradient: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient` times `slope` in another type; in its own place if it has that type."""
    if gradient.dtype is dtype:
        return gradient.mul_(slope)
    scaled = torch.empty_like(gradient, dtype=dtype)
    for narrow, wide in zip(scaled.split(WEIGHT_ROWS), gradient.split(WEIGHT_ROWS), strict=True):
        narrow.copy_(wide.mul_(slope))
    return scaled


def _logits(products: Sequence[Product], rows: slice) -> Tensor:
    first, *others = products
    scores_MV = first.states_MK[rows] @ first.weight_VK.T
    for states_MK, weight_VK in others:
        scores_MV.addmm_(states_MK[rows], weight_VK.T)
    return scores_MV


class _Gradients:
    """The gradients of products, collected a chunk of rows at a time; only those that are wanted.

    A frozen output matrix needs none, and saves a third of the arithmetic.

    Attributes:
        wanted: whether any is.
        found: those of states and weight of each product in turn; None where not wanted.
    """

    def __init__(self, products: Sequence[Product], wanted: Sequence[bool]) -> None:
        self.wanted = any(wanted)
        self._products = products
        self.found: list[Tensor | None] = []
        for (states_MK, weight_VK), of_states, of_weight in zip(
            products, wanted[::2], wanted[1::2], strict=True
        ):
            self.found.append(torch.empty_like(states_MK) if of_states else None)
            # A sum over chunks is float32 whatever the weights are.
            alone = len(states_MK) <= CHUNK_ROWS
            dtype = weight_VK.dtype if alone else torch.float32
            make = torch.empty_like if len(states_MK) else torch.zeros_like
            self.found.append(make(weight_VK, dtype=dtype) if of_weight else None)

    def add(self, slope_MV: Tensor, rows: slice) -> None:
        """Add what the gradient of some rows' logits says."""
        for number, (states_MK, weight_VK) in enumerate(self._products):
            of_states_MK, of_weight_VK = self.found[2 * number : 2 * number + 2]
            if of_states_MK is not None:
                of_states_MK[rows] = slope_MV @ weight_VK
            if of_weight_VK is not None:
                _add_product(of_weight_VK, slope_MV, states_MK[rows], first=rows.start == 0)


def _add_product(sum_VK: Tensor, slope_MV: Tensor, states_MK: Tensor, *, first: bool) -> None:
    """Add slope^T states to a sum; put it there where it is the first."""
    if sum_VK.dtype is states_MK.dtype:
        torch.addmm(sum_VK, slope_MV.T, states_MK, beta=0.0 if first else 1.0, out=sum_VK)
        return
    pieces = zip(sum_VK.split(WEIGHT_ROWS), slope_MV.split(WEIGHT_ROWS, dim=1), strict=True)
    for piece_VK, columns_MV in pieces:
        product_VK = columns_MV.T @ states_MK
        if first:
            piece_VK.copy_(product_VK)
        else:
            piece_VK += product_VK
