"""Prompts of any length by native calls of some two thousand tokens each.

A call reads all weights once, whatever the number of its tokens, and needs memory for each of them:
the pieces are long enough for the first to be little and short enough for the second. Where a
prompt is cut changes no bit of the result.

Knows the plan of a model and the states of sequences; nothing of modules. Needs no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_prefill import run_prefill
from jamba_lm.model.sequence_memory import SequenceMemory
from jamba_lm.native_plan import NativePlan, plan_memories

# Rows of one call, at most.
CALL_ROWS = 2048

# Calls have about the same number of rows, rounded up to this.
ROUND_ROWS = 64

# One piece of one call: the sequence, and its tokens [first, last).
_Piece = tuple[int, int, int]


def prefill(
    plan: NativePlan,
    sequences: Sequence[Sequence[int]],
    states: Sequence[SequenceMemory[Any]],
    logit_rows: Sequence[int],
    *,
    path: str | None = None,
) -> Floats:
    """Read any number of tokens and return logits, `[len(logit_rows), V]`.

    States move past all tokens together, after the last call: one that fails or is interrupted
    leaves them where they were.

    Args:
        plan: of the model.
        sequences: token ids, in range, none of the lists empty.
        states: one each, all different.
        logit_rows: among the rows of all sequences laid end to end.
        path: forces an instruction set, for tests.
    """
    moved = [state.fork() for state in states]
    rising = sorted(set(logit_rows))
    found, first_row = [], 0
    for pieces in _calls([len(ids) for ids in sequences]):
        lengths = [last - first for _, first, last in pieces]
        end_row = first_row + sum(lengths)
        rows = rising[bisect_left(rising, first_row) : bisect_left(rising, end_row)]
        here = [moved[b] for b, _, _ in pieces]
        ids = [sequences[b][first:last] for b, first, last in pieces]
        memories, after = plan_memories(here, lengths)
        found.append(
            run_prefill(
                plan.model,
                [one for part in ids for one in part],
                [0, *accumulate(lengths)],
                memories,
                [row - first_row for row in rows],
                threads=plan.threads,
                path=path,
                times=plan.times,
            )
        )
        for state, layers, part in zip(here, after, ids, strict=True):
            state.advance(layers, part)
        first_row = end_row
    for state, reached, all_ids in zip(states, moved, sequences, strict=True):
        state.move_to(reached, all_ids)
    logits = found[0] if len(found) == 1 else np.concatenate(found)
    if rising == list(logit_rows):
        return logits
    return logits[[bisect_left(rising, row) for row in logit_rows]]


def _calls(lengths: Sequence[int]) -> Iterator[list[_Piece]]:
    """Cut sequences laid end to end into calls of about the same number of rows."""
    num_rows = sum(lengths)
    num_calls = -(-num_rows // CALL_ROWS)
    most = -(-num_rows // (num_calls * ROUND_ROWS)) * ROUND_ROWS
    pieces: list[_Piece] = []
    room = most
    for b, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            pieces.append((b, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
