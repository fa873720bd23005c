"""What the ranks of a mesh tell each other in one step: how many bytes, how often, with whom.

Needs no torch. Knows no speed: `devices` turns bytes into seconds.

M rows of a rank, D model width, C Mamba channels, N state size, R rank of dt, G key/value heads, P
head width, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jamba_lm.analysis.training_cost.mesh import Group, group_of
from jamba_lm.analysis.training_cost.rank import Rank, layer_kinds
from jamba_lm.analysis.training_cost.shares import Share, rank_shares

Pattern = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
Purpose = Literal["weights", "gradients", "tensor", "experts", "context", "replicas"]
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of exchange of a rank.

    Attributes:
        purpose: what for.
        name: what is exchanged, for a person.
        pattern: how.
        group: with whom.
        num_bytes: of one: what a rank has afterwards (all-gather), before (reduce-scatter,
            all-reduce), or gives away, its own share included (all-to-all); what is sent (send).
        count: how often in a pass, or in a step for `replicas`.
        hidden: whether computing goes on meanwhile.
    """

    purpose: Purpose
    name: str
    pattern: Pattern
    group: Group
    num_bytes: int
    count: float
    hidden: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes that leave a rank, all times together."""
        n = self.group.size
        share = {"all-reduce": 2 * (n - 1) / n, "send": 1.0}.get(self.pattern, (n - 1) / n)
        return self.count * self.num_bytes * share


def pass_exchanges(rank: Rank) -> list[Exchange]:
    """List the exchanges of one pass, those of groups of one rank left out."""
    found = [*_weights(rank), *_tensor(rank), *_experts(rank), *_context(rank)]
    return [one for one in found if one.group.size > 1]


def step_exchanges(rank: Rank) -> list[Exchange]:
    """List the exchanges that a step needs once: the sums over replicas."""
    group = group_of(rank.mesh, "replicate")
    held = sum(one.copies * one.held for one in rank_shares(rank.config, rank.mesh))
    found = Exchange("replicas", "gradients", "all-reduce", group, held * FLOAT, 1, hidden=True)
    return [found] if group.size > 1 else []


def _weights(rank: Rank) -> Iterator[Exchange]:
    shares = rank_shares(rank.config, rank.mesh)
    layers = rank.config.num_layers
    for axis, chosen in (
        ("weights", [one for one in shares if one.part != "experts"]),
        ("expert weights", [one for one in shares if one.part == "experts"]),
    ):
        group = group_of(rank.mesh, axis)
        whole = sum(_gathered_bytes(one, rank.work.width) for one in chosen)
        values = sum(one.copies * one.gathered for one in chosen)
        name = "of experts" if axis == "expert weights" else "of the rest"
        # Once for the forward pass and once for the backward pass, a layer at a time.
        yield Exchange(
            "weights", name, "all-gather", group, whole // layers, 2 * layers, hidden=True
        )
        yield Exchange(
            "gradients",
            name,
            "reduce-scatter",
            group,
            values * FLOAT // layers,
            layers,
            hidden=True,
        )


def _gathered_bytes(one: Share, width: int) -> int:
    return one.copies * one.gathered * (FLOAT if one.wide else width)


def _tensor(rank: Rank) -> Iterator[Exchange]:
    config, w, group = rank.config, rank.work.width, group_of(rank.mesh, "tensor")
    kinds = _kinds(rank)
    stream = rank.rows * config.d_model * w
    # Forward, backward, and forward again where layers are computed again.
    through = 3 if rank.work.recompute else 2
    dealt_out = kinds["moe"] if rank.mesh.expert > 1 else 0
    split = config.num_layers + kinds["mlp"] + kinds["moe"] - dealt_out
    if rank.mesh.sequence:
        for pattern in ("all-gather", "reduce-scatter"):
            yield Exchange("tensor", "rows", pattern, group, stream, through * split + 2)
    else:
        yield Exchange("tensor", "rows", "all-reduce", group, stream, through * split + 2)
        # Each rank decides for a share of the rows; all need the result.
        yield Exchange("tensor", "routed rows", "all-gather", group, stream, through * dealt_out)
    small = rank.rows * (config.dt_rank + 2 * config.state_size) * w
    yield Exchange("tensor", "dt, B and C", "all-reduce", group, small, through * kinds["mamba"])


def _experts(rank: Rank) -> Iterator[Exchange]:
    config, group = rank.config, group_of(rank.mesh, "expert")
    rows = rank.routed_rows * config.experts_per_token * config.d_model * rank.work.width
    through = 3 if rank.work.recompute else 2
    # There and back.
    count = 2 * through * _kinds(rank)["moe"]
    yield Exchange("experts", "rows there and back", "all-to-all", group, rows, count)


def _context(rank: Rank) -> Iterator[Exchange]:
    config, w, group = rank.config, rank.work.width, group_of(rank.mesh, "context")
    kinds, sequences = _kinds(rank), rank.work.sequences
    through = 3 if rank.work.recompute else 2
    window = sequences * (config.conv_width - 1) * rank.channels * w
    state = sequences * rank.channels * config.state_size * FLOAT
    keys = 2 * sequences * rank.work.tokens * rank.groups * config.d_head * w
    yield Exchange("context", "last inputs", "send", group, window, through * kinds["mamba"])
    # From the first rank to the last: each adds what it has, so the last waits for all.
    hops = max(1, group.size - 1)
    yield Exchange("context", "states", "send", group, state, through * kinds["mamba"] * hops)
    forward = through - 1
    yield Exchange(
        "context", "keys and values", "all-gather", group, keys, forward * kinds["attention"]
    )
    yield Exchange("context", "their gradients", "reduce-scatter", group, keys, kinds["attention"])


def _kinds(rank: Rank) -> Counter[str]:
    found: Counter[str] = Counter()
    for spec, layers in layer_kinds(rank.config):
        found[spec.mixer] += layers
        found[spec.feed_forward] += layers
    return found
