"""Whether engines compute the same thing: a wrong result has no speed.

The truth is transformers' logits in the widest type that fits into memory. An engine may be as far
from it as the rounding of its type explains; where the truth's best two tokens are closer together
than that, either is right. It knows no engine, only logits and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The largest root mean square error, as a share of the root mean square of the truth's logits
# around their mean.
BOUNDS: Mapping[str, float] = {
    # Sums in another order through up to 28 layers.
    "fp32": 1e-4,
    # transformers' own bfloat16 is at 2 to 5 per cent after 8 to 28 layers.
    "bf16": 0.10,
    # What packed weights stand for, in bfloat16; `packed_parity` says what of the weights.
    "int8, the same weights": 0.10,
    "experts-int4, the same weights": 0.10,
    "int4, the same weights": 0.10,
    # The same as it is used, with rows rounded to 8 bits where a processor multiplies such numbers.
    "int8, as used": 0.10,
    "experts-int4, as used": 0.10,
    "int4, as used": 0.10,
    # llama.cpp rounds activations to the type of the weights, or to 8 bits.
    "F32": 2e-3,
    "F16": 2e-2,
    "BF16": 0.30,
    "Q8_0": 0.40,
    "Q4_K_M": 1.00,
}

# What our bfloat16 may be off, compared with transformers' own on the same prompt: medians over its
# tokens, since now and then a rounding picks another expert, here as often as there.
BF16_RATIO = 1.25

# Two logits that differ by less than so many errors are a tie.
TIE_ERRORS = 6.0


@dataclass(frozen=True, slots=True)
class Parity:
    """How one engine compares with the truth.

    Attributes:
        error: root mean square of the difference of the logits, over that of the truth's.
        median_error: the same of single tokens, and the median of them.
        worst: the largest difference, over the largest logit.
        divergence: mean Kullback-Leibler divergence from the truth, in nats.
        top1: share of the tokens after which the likeliest token is the same.
        same_greedy: tokens that are the same as the truth's own, before the first that is not.
        greedy: tokens written.
        problem: why the engine is not measured; None when it may be.
    """

    error: float
    median_error: float
    worst: float
    divergence: float
    top1: float
    same_greedy: int
    greedy: int
    problem: str | None


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the difference, over that of the truth around its mean."""
    return float(token_errors(found, truth).square().mean().sqrt())


def token_errors(found: Tensor, truth: Tensor) -> Tensor:
    """Return the error after each token, over the spread of all of the truth's logits."""
    centred = truth - truth.mean(-1, keepdim=True)
    return (found - truth).square().mean(-1).sqrt() / centred.square().mean().sqrt()


def compare(
    kind: str,
    found: Tensor,
    truth: Tensor,
    greedy: Sequence[int],
    truth_greedy: Sequence[int],
    truth_of_greedy: Tensor,
    bound: float | None = None,
) -> Parity:
    """Hold an engine's logits and tokens against the truth.

    Args:
        kind: the type it computes in, one of `BOUNDS`.
        found: its logits, [T, V].
        truth: the truth's logits after the same tokens.
        greedy: what it wrote.
        truth_greedy: what the truth wrote.
        truth_of_greedy: the truth's logits before each token of `greedy`, [len(greedy), V].
        bound: the largest error, where it is not that of `BOUNDS`.
    """
    found, truth = found.float(), truth.float()
    problem: str | None = None
    if found.shape != truth.shape or not torch.isfinite(found).all():
        problem = f"logits of shape {tuple(found.shape)}, expected finite {tuple(truth.shape)}"
        return Parity(1.0, 1.0, 1.0, float("inf"), 0.0, 0, len(greedy), problem)
    error = relative_error(found, truth)
    bound = BOUNDS[kind] if bound is None else bound
    same = 0
    while same < min(len(greedy), len(truth_greedy)) and greedy[same] == truth_greedy[same]:
        same += 1
    if error > bound:
        problem = f"its logits are off by {error:.2g} of their spread, {kind} explains {bound:.2g}"
    else:
        wrong = first_wrong(greedy, truth_of_greedy, max(error, 1e-6))
        if wrong is not None:
            problem = f"token {wrong} that it writes is not one of the likeliest"
    return Parity(
        error=error,
        median_error=float(token_errors(found, truth).median()),
        worst=float((found - truth).abs().max() / truth.abs().max()),
        divergence=float(divergence(truth, found)),
        top1=float((found.argmax(-1) == truth.argmax(-1)).float().mean()),
        same_greedy=same,
        greedy=len(greedy),
        problem=problem,
    )


def first_wrong(greedy: Sequence[int], truth: Tensor, error: float) -> int | None:
    """Return the first token written that the truth finds clearly worse than its best one.

    Args:
        greedy: tokens written.
        truth: the truth's logits before each of them.
        error: relative error of the engine that wrote them.
    """
    spread = (truth - truth.mean(-1, keepdim=True)).square().mean().sqrt()
    for index, token in enumerate(greedy):
        behind = truth[index].max() - truth[index, token]
        if behind > TIE_ERRORS * error * spread:
            return index
    return None


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    """Return the mean over tokens of KL(truth || found), in nats."""
    log_p, log_q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
