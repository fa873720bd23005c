"""What training takes of one rank's memory, part by part, in bytes.

Needs no torch. Weights, gradients and moments are exact; activations are those of `activations`,
exact on a CPU; what lies between the parts (fragments, libraries) is the device's reserve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from jamba_lm.analysis.training_cost.activations import FLOAT, Activations, pass_activations
from jamba_lm.analysis.training_cost.rank import Rank
from jamba_lm.analysis.training_cost.shares import Share, layer_values, rank_shares

# A layer's weights are there while it runs, and the next one's are on their way.
GATHERED_LAYERS = 2
_ENDS = ("embedding", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the rank with the most.

    Attributes:
        parameters: in the type that is computed with, on one rank. On several, the float32 shards
            are rounded when they are gathered.
        gradients: float32 sums over the passes of a step: of this rank's shards. On one rank the
            gradient of one pass, and sums only when a step has several.
        optimizer: float32 master weights and two moments.
        gathered: whole weights and gradients of the layers that run, and of embedding and head.
        activations: see `activations`; without `logits`.
        logits: pieces of logits; at other times the layer that is computed again has this room.
        buffers: what is sent or received and is no activation.
        reserve: what the device's libraries and fragments take.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    buffers: int
    reserve: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, one.name) for one in fields(self))


def rank_memory(
    rank: Rank, passes: int, reserve: int = 0, workers: int = 1
) -> tuple[RankMemory, Activations]:
    """Add up the memory of the rank with the most, and say what its activations are.

    Args:
        rank: a share of the shape.
        passes: that it, or each of its workers, makes in a step, one after the other.
        reserve: bytes that nobody can use.
        workers: passes that go on at the same time, each with its own weights and activations; the
            optimizer is theirs together.
    """
    shares, kept = rank_shares(rank.config, rank.mesh), pass_activations(rank)
    w = rank.work.width
    held = sum(one.copies * one.held for one in shares)
    alone = rank.mesh.world_size == 1
    logits = kept.logits if kept.logits > kept.again else 0
    own = _bytes(shares, w, lambda one: one.held) if alone else 0
    memory = RankMemory(
        parameters=workers * own,
        gradients=workers * own + (0 if alone and passes == 1 else held * FLOAT),
        optimizer=3 * held * FLOAT,
        gathered=0 if alone else _gathered(rank, shares),
        activations=workers * (kept.total - logits),
        logits=workers * logits,
        buffers=_buffers(rank),
        reserve=reserve,
    )
    return memory, kept


def _bytes(shares: Sequence[Share], width: int, values: Callable[[Share], int]) -> int:
    return sum(one.copies * values(one) * (FLOAT if one.wide else width) for one in shares)


def _gathered(rank: Rank, shares: Sequence[Share]) -> int:
    w = rank.work.width
    # Embedding, head and final norm belong to no layer: they stay whole through a pass, and so
    # does their gradient.
    ends = [one for one in shares if one.part in _ENDS]
    found = 2 * _bytes(ends, w, lambda one: one.gathered)
    largest = max(layer_values(rank.config, rank.mesh))
    # Weights of two layers, and the gradient of one before it is cut up and summed in float32.
    return found + GATHERED_LAYERS * largest * w + largest * (w + FLOAT)


def _buffers(rank: Rank) -> int:
    mesh, config, w = rank.mesh, rank.config, rank.work.width
    found = 0
    if mesh.tensor > 1:
        found += rank.rows * config.d_model * w
    if mesh.expert > 1 and config.num_experts > 1:
        # What is sent and what comes, there or back.
        found += 2 * rank.rows * config.experts_per_token * config.d_model * w
    return found
