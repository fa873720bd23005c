"""What the ranks of a mesh tell each other in one step: how many bytes, how often, with whom.

As `training/parallel` and `training/sharding.py` do it. Needs no torch. Knows no speed: `devices`
turns bytes into seconds.

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
from jamba_lm.analysis.training_cost.shares import rank_shares

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
    """List the exchanges that a step needs once: sums over those who work on other rows."""
    shares = rank_shares(rank.config, rank.mesh)
    found = []
    purposes: tuple[tuple[Purpose, str, str, bool], ...] = (
        ("replicas", "gradients", "replicate", False),
        # When the last pass is over.
        ("gradients", "of A_log and D", "rows", True),
    )
    for purpose, name, axis, wide in purposes:
        held = sum(one.copies * one.held for one in shares if one.wide == wide)
        group = group_of(rank.mesh, axis)
        found.append(Exchange(purpose, name, "all-reduce", group, held * FLOAT, 1, hidden=not wide))
    return [one for one in found if one.group.size > 1]


def _weights(rank: Rank) -> Iterator[Exchange]:
    shares = [one for one in rank_shares(rank.config, rank.mesh) if not one.wide]
    layers = rank.config.num_layers
    for axis, chosen in (
        ("weights", [one for one in shares if one.part != "experts"]),
        ("expert weights", [one for one in shares if one.part == "experts"]),
    ):
        group = group_of(rank.mesh, axis)
        values = sum(one.copies * one.gathered for one in chosen)
        whole = values * rank.work.width
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


def _tensor(rank: Rank) -> Iterator[Exchange]:
    config, w, group = rank.config, rank.work.width, group_of(rank.mesh, "tensor")
    kinds = _kinds(rank)
    stream = rank.rows * config.d_model * w
    # Forward, backward, and forward again where layers are computed again.
    through = 3 if rank.work.recompute else 2
    split = 2 * config.num_layers
    if rank.mesh.sequence:
        for pattern in ("all-gather", "reduce-scatter"):
            yield Exchange("tensor", "rows", pattern, group, stream, through * split + 2)
    else:
        yield Exchange("tensor", "rows", "all-reduce", group, stream, through * split + 2)
    small = rank.rows * (config.dt_rank + 2 * config.state_size) * w
    yield Exchange("tensor", "dt, B and C", "all-reduce", group, small, through * kinds["mamba"])
    # Every rank weighs its part of what an expert gives.
    weights = rank.rows * config.experts_per_token * FLOAT
    yield Exchange("tensor", "weights of experts", "all-reduce", group, weights, kinds["moe"])
    if config.num_kv_heads % rank.mesh.tensor:
        shared = 2 * config.num_kv_heads * config.d_head * config.d_model * w
        yield Exchange(
            "tensor", "gradients of shared heads", "all-reduce", group, shared, kinds["attention"]
        )


def _experts(rank: Rank) -> Iterator[Exchange]:
    config, group = rank.config, group_of(rank.mesh, "expert")
    rows = rank.rows * config.experts_per_token * config.d_model * rank.work.width
    through = 3 if rank.work.recompute else 2
    # There and back.
    count = 2 * through * _kinds(rank)["moe"]
    yield Exchange("experts", "rows there and back", "all-to-all", group, rows, count)


def _context(rank: Rank) -> Iterator[Exchange]:
    config, w, group = rank.config, rank.work.width, group_of(rank.mesh, "context")
    kinds = _kinds(rank)
    # A rank shows the others the end of its rows: they are one sequence's.
    window = (config.conv_width - 1) * rank.channels * w
    state = rank.channels * (config.state_size + 1) * FLOAT
    keys = 2 * rank.rows * rank.groups * config.d_head * w
    forward = 2 if rank.work.recompute else 1
    for name, num_bytes, layers in (
        ("last inputs", window, kinds["mamba"]),
        ("states", state, kinds["mamba"]),
        ("keys and values", keys, kinds["attention"]),
    ):
        shown = group.size * num_bytes
        yield Exchange("context", name, "all-gather", group, shown, forward * layers)
        yield Exchange("context", name, "reduce-scatter", group, shown, layers)


def _kinds(rank: Rank) -> Counter[str]:
    found: Counter[str] = Counter()
    for spec, layers in layer_kinds(rank.config):
        found[spec.mixer] += layers
        found[spec.feed_forward] += layers
    return found
