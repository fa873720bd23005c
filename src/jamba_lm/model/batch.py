"""Which rows of a call belong to which sequence: several sequences, laid end to end.

There is no padding in this project: a prompt, a piece of a prompt, one step for many users
and packed training documents are all a `Batch`. It does not know what the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from jamba_lm.model.call_arguments import require_sequences
from jamba_lm.model.routing import RoutingLog
from jamba_lm.model.state import SequenceState


@dataclass(frozen=True, slots=True)
class Batch:
    """Where each sequence starts among the M rows of a call, and what it remembers.

    Attributes:
        lengths: tokens of each sequence in this call, each at least 1.
        offsets: int64 of length B+1, on the CPU: sequence b is rows offsets[b]:offsets[b+1].
        states: one state per sequence, or None when every sequence starts here and nothing
            needs to be remembered.
        backend: kernel back-end to use, by name; None takes the fastest that can.
        routing: when not None, a list for example, every mixture of experts appends its
            decision to it (the balance loss and the studies read it).
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    states: tuple[SequenceState, ...] | None
    backend: str | None
    routing: RoutingLog | None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        states: Sequence[SequenceState] | None = None,
        backend: str | None = None,
        routing: RoutingLog | None = None,
    ) -> Batch:
        """Build a batch of sequences with these lengths.

        Raises:
            InputError: no sequence, an empty one, another number of states than of
                sequences, or the same state twice.
        """
        lengths = tuple(int(length) for length in lengths)
        states = None if states is None else tuple(states)
        require_sequences(lengths, states)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)
        return cls(lengths, offsets, states, backend, routing)

    @property
    def num_rows(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.lengths)

    def spans(self) -> list[tuple[int, int]]:
        """List the (first, past last) row of each sequence."""
        ends = list(accumulate(self.lengths))
        return list(zip([0, *ends], ends, strict=False))

    def numbers_of(self, rows: Literal["all", "last"] | Tensor) -> list[int]:
        """List which of the M rows are meant by "all", "last" or a tensor of row numbers."""
        if isinstance(rows, Tensor):
            return rows.tolist()
        if rows == "all":
            return list(range(self.num_rows))
        return [end - 1 for end in accumulate(self.lengths)]

    def positions(self) -> Tensor:
        """Return each row's position in its own sequence, int64 of shape [M], on the CPU."""
        before = [0] * len(self.lengths)
        if self.states is not None:
            before = [state.num_tokens for state in self.states]
        return torch.cat(
            [
                torch.arange(past, past + length)
                for past, length in zip(before, self.lengths, strict=True)
            ]
        )
