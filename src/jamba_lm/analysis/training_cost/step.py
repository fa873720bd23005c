"""How long a step takes on a mesh, from operations and exchanges and the speeds of a machine.

Needs no torch. What computes and what is exchanged is listed elsewhere; here it is put together:
what waits for what, and what hides behind what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from jamba_lm.analysis.training_cost.exchanges import (
    Exchange,
    pass_exchanges,
    step_exchanges,
)
from jamba_lm.analysis.training_cost.operations import (
    Flops,
    Operation,
    flops_of,
    pass_operations,
)
from jamba_lm.analysis.training_cost.rank import Rank
from jamba_lm.analysis.training_cost.shares import rank_shares


class Machine(Protocol):
    """What knows how fast things are."""

    @property
    def workers(self) -> int:
        """Passes that go on at the same time on one device, each with weights of its own."""

    @property
    def peak_flops(self) -> float:
        """Operations a second that utilisation is a share of."""

    def seconds(self, one: Operation, width: int) -> tuple[float, float]:
        """Return the seconds of an operation forward and backward, all repetitions together."""

    def optimizer_seconds(self, values: int, width: int) -> float:
        """Return the seconds of an optimizer step over so many values."""

    def exchange_seconds(self, one: Exchange) -> float:
        """Return the seconds of an exchange, all repetitions together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The seconds of one optimizer step, and what they are made of.

    Attributes:
        passes: forward and backward passes, one after the other on each rank or worker.
        tokens: of all ranks and passes.
        forward: of all passes, by part.
        backward: likewise.
        again: forward once more, where layers are computed again.
        exchanges: of one pass, and those of a step, each with its seconds.
        waiting: seconds that nothing is computed for exchanges, by purpose.
        optimizer: AdamW.
        others: what the machine adds for what is not accounted for.
    """

    passes: int
    tokens: int
    forward: Mapping[str, float]
    backward: Mapping[str, float]
    again: float
    exchanges: tuple[tuple[Exchange, float], ...]
    waiting: Mapping[str, float]
    optimizer: float
    others: float

    @property
    def computing(self) -> float:
        """Seconds of arithmetic, the optimizer's left out."""
        return sum(self.forward.values()) + sum(self.backward.values()) + self.again

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.computing + sum(self.waiting.values()) + self.optimizer + self.others

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds


def step_time(rank: Rank, machine: Machine, passes: int, others: float = 0.0) -> StepTime:
    """Predict one step.

    What is exchanged while computing goes on hides behind it, but for the first layer's weights
    and the last layer's gradients, which nothing is there to hide.

    Args:
        rank: the slowest one.
        machine: how fast it is.
        passes: that each rank, or each worker, makes in a step.
        others: share of the time that the machine says is spent on what is not counted.
    """
    width = rank.work.width
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    layers = 0.0
    for one in pass_operations(rank):
        there, back = machine.seconds(one, width)
        forward[one.part] = forward.get(one.part, 0.0) + passes * there
        backward[one.part] = backward.get(one.part, 0.0) + passes * back
        if one.part not in ("head", "embedding"):
            layers += passes * there
    again = layers if rank.work.recompute else 0.0
    computing = sum(forward.values()) + sum(backward.values()) + again
    each = tuple((one, machine.exchange_seconds(one)) for one in pass_exchanges(rank))
    once = tuple((one, machine.exchange_seconds(one)) for one in step_exchanges(rank))
    waiting: dict[str, float] = {}
    for exchange, seconds in each:
        if not exchange.hidden:
            waiting[exchange.purpose] = waiting.get(exchange.purpose, 0.0) + passes * seconds
    behind = [(exchange, seconds) for exchange, seconds in each if exchange.hidden]
    hidden = passes * sum(seconds for _, seconds in behind)
    first_and_last = passes * sum(seconds / exchange.count for exchange, seconds in behind)
    if hidden:
        waiting["weights and gradients"] = max(first_and_last, hidden - computing)
    last_backward = sum(backward.values()) / passes
    for exchange, seconds in once:
        left = max(0.0, seconds - last_backward) if exchange.hidden else seconds
        waiting[exchange.purpose] = waiting.get(exchange.purpose, 0.0) + left
    optimizer = machine.optimizer_seconds(held_values(rank), width)
    known = computing + sum(waiting.values()) + optimizer
    return StepTime(
        passes=passes,
        tokens=passes
        * machine.workers
        * rank.work.sequences
        * rank.work.tokens
        * rank.mesh.num_readers,
        forward=forward,
        backward=backward,
        again=again,
        exchanges=(*each, *once),
        waiting=waiting,
        optimizer=optimizer,
        others=known * others / (1 - others),
    )


def held_values(rank: Rank) -> int:
    """Return how many parameters the rank with the most keeps and changes."""
    return sum(one.copies * one.held for one in rank_shares(rank.config, rank.mesh))


def flops_per_token(rank: Rank) -> dict[str, Flops]:
    """Return the arithmetic of one token through the whole model, by part.

    Args:
        rank: of a mesh of one, or the parts of all ranks would have to be added up.
    """
    assert rank.mesh.world_size == 1
    found: dict[str, Flops] = {}
    for one in pass_operations(rank):
        flops = flops_of(one)
        if flops.forward:
            found[one.part] = found.get(one.part, Flops(0, 0, 0)) + flops
    rows = rank.rows
    return {
        part: Flops(flops.forward / rows, flops.backward / rows, flops.again / rows)
        for part, flops in found.items()
    }
