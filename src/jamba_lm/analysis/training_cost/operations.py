"""The operations of one forward pass of one rank, by kind and size, and what each computes.

Needs no torch. The list is what every prediction is made of: its arithmetic is counted here, its
time by whoever knows a machine. Knows no mesh but through `Rank`.

M rows, D model width, C Mamba channels, N state size, W convolution taps, R rank of dt, F inner
width, H query heads, P head width, X experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jamba_lm.analysis.roofline import Part
from jamba_lm.analysis.training_cost.rank import Rank, layer_kinds, padded_rows
from jamba_lm.model.layout import LayerSpec

Kind = Literal[
    "product", "attention", "scan", "convolution", "norm", "gate", "move", "route", "lookup", "loss"
]

# Multiplications and additions of one state update of the scan, an exponential counted as one:
# dt A, exp, times h, dt u times B, plus, times C, plus.
SCAN_FORWARD = 7
# The gradients of h, C, the decay, dt, A, B and dt u, each a product and most of them a sum.
SCAN_BACKWARD = 15
# The states between two checkpoints once more, without their products with C.
SCAN_AGAIN = 5
# One product of scores forward and four with gradients; the scores once more.
ATTENTION_AGAIN = 0.5


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, and how often a pass does it.

    Attributes:
        part: of the model.
        kind: what is done; it decides what `sizes` are.
        sizes: product (rows, inputs, outputs); attention (queries, keys before them, heads,
            key/value heads, head width); scan (rows, channels, states); convolution (rows,
            channels, taps); norm, gate and move (rows, width); route (rows, width, experts, taken);
            lookup and loss (rows, width, vocabulary).
        count: how often.
    """

    part: Part
    kind: Kind
    sizes: tuple[int, ...]
    count: float = 1.0


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of the products, of attention, the scan and the convolution.

    Attributes:
        forward: once through.
        backward: of the gradients.
        again: what the backward pass computes a second time.
    """

    forward: float
    backward: float
    again: float

    def __add__(self, other: Flops) -> Flops:
        """Add up."""
        return Flops(
            self.forward + other.forward, self.backward + other.backward, self.again + other.again
        )

    @property
    def needed(self) -> float:
        """Without what is computed a second time."""
        return self.forward + self.backward


def flops_of(one: Operation) -> Flops:
    """Count the arithmetic of an operation, all its repetitions together.

    What runs row by row beside the products (norms, gates, sums) is not counted: its time is that
    of its bytes.
    """
    forward = backward = again = 0.0
    if one.kind == "product":
        rows, inputs, outputs = one.sizes
        forward = 2.0 * rows * inputs * outputs
        backward = 2 * forward
    elif one.kind == "loss":
        rows, width, vocab = one.sizes
        forward = 2.0 * rows * width * vocab
        backward = 2 * forward
    elif one.kind == "attention":
        queries, past, heads, _, width = one.sizes
        forward = 4.0 * (queries * past + queries * (queries + 1) / 2) * heads * width
        backward, again = 2 * forward, ATTENTION_AGAIN * forward
    elif one.kind == "scan":
        rows, channels, states = one.sizes
        updates = float(rows * channels * states)
        forward, backward = SCAN_FORWARD * updates, SCAN_BACKWARD * updates
        again = SCAN_AGAIN * updates
    elif one.kind == "convolution":
        rows, channels, taps = one.sizes
        forward = 2.0 * rows * channels * taps
        backward = 2 * forward
    return Flops(one.count * forward, one.count * backward, one.count * again)


def pass_operations(rank: Rank) -> list[Operation]:
    """List the operations of a forward pass over all layers, the embedding and the loss."""
    config, rows = rank.config, rank.rows
    found = [Operation("embedding", "lookup", (rows, config.d_model, rank.vocabulary))]
    for spec, layers in layer_kinds(config):
        found += [replace(one, count=layers * one.count) for one in layer_operations(rank, spec)]
    return [
        *found,
        Operation("norms", "norm", (rank.kept_rows, config.d_model)),
        Operation("head", "loss", (rows, config.d_model, rank.vocabulary)),
    ]


def layer_operations(rank: Rank, spec: LayerSpec) -> list[Operation]:
    """List the operations of one layer, forward."""
    stream = (rank.kept_rows, rank.config.d_model)
    mixer = _mamba(rank) if spec.mixer == "mamba" else _attention(rank)
    feed_forward = _mixture(rank) if spec.feed_forward == "moe" else _mlp(rank)
    return [
        Operation("norms", "norm", stream, 2),
        Operation("norms", "move", stream, 2),
        *mixer,
        *feed_forward,
    ]


def _mamba(rank: Rank) -> list[Operation]:
    config, M, C = rank.config, rank.rows, rank.channels
    D, N, R = config.d_model, config.state_size, config.dt_rank
    found = [
        Operation("Mamba projections", "product", (M, D, 2 * C)),
        # The two halves' gradients are put side by side.
        Operation("Mamba projections", "move", (M, C)),
        Operation("convolution", "convolution", (M, C, config.conv_width)),
        Operation("Mamba projections", "product", (M, C, R + 2 * N)),
        Operation("Mamba projections", "product", (M, R, C)),
        Operation("scan", "scan", (M, C, N)),
        Operation("Mamba projections", "gate", (M, C)),
        Operation("Mamba projections", "product", (M, C, D)),
    ]
    if config.inner_norms:
        found += [Operation("norms", "norm", (M, R)), Operation("norms", "norm", (M, N), 2)]
    return found


def _attention(rank: Rank) -> list[Operation]:
    config, M = rank.config, rank.rows
    D, P, H, G = config.d_model, config.d_head, rank.heads, rank.groups
    # Of the ranks of `context`, the last one has the most keys before its queries.
    past = rank.work.tokens - rank.tokens
    return [
        Operation("attention projections", "product", (M, D, H * P)),
        Operation("attention projections", "product", (M, D, G * P), 2),
        Operation(
            "attention", "attention", (rank.tokens, past, H, G, P), float(rank.work.sequences)
        ),
        Operation("attention projections", "product", (M, H * P, D)),
    ]


def _mlp(rank: Rank) -> list[Operation]:
    M, D, F = rank.rows, rank.config.d_model, rank.inner
    return [
        Operation("MLP", "product", (M, D, F), 2),
        Operation("MLP", "gate", (M, F)),
        Operation("MLP", "product", (M, F, D)),
    ]


def _mixture(rank: Rank) -> list[Operation]:
    config, M, F = rank.config, rank.rows, rank.inner
    D, X, K = config.d_model, config.num_experts, config.experts_per_token
    rows = max(1, round(padded_rows(rank.expert_rows, rank.work.width)))
    return [
        Operation("router", "product", (M, D, X)),
        Operation("experts", "route", (M, D, X, K)),
        Operation("experts", "product", (rows, D, F), 2.0 * rank.experts),
        Operation("experts", "gate", (rows, F), float(rank.experts)),
        Operation("experts", "product", (rows, F, D), float(rank.experts)),
    ]
