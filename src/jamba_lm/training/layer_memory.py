"""What one layer remembers at every cut of a pass in segments, and the gradients of it.

Two kinds of layers remember two kinds of things, behind one face. Knows states and segments, and
nothing of losses.

M rows of the pass, G key/value heads, P head width, L = convolution taps - 1, C Mamba channels, N
state size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from jamba_lm.model.batch import Batch
from jamba_lm.model.state import KeyValueState, LayerState, MambaState

if TYPE_CHECKING:
    from jamba_lm.training.segments import Segment

Pairs = list[tuple[Tensor, Tensor]]


class LayerMemory(Protocol):
    """What a layer of either kind remembers; states are those of its kind."""

    def states(self, segment: Segment, batch: Batch) -> list[Any]:
        """Return what the sequences of a segment remember before it."""

    def keep(self, segment: Segment, states: list[Any]) -> None:
        """Remember what the next segment goes on from."""

    def leaves(
        self, segment: Segment, batch: Batch, *, truncated: bool
    ) -> tuple[list[Tensor], list[Any]]:
        """Return the states before a segment, and which tensors are to have gradients."""

    def slopes(self, segment: Segment, states: list[Any]) -> Pairs:
        """Pair what this segment left with the gradients that later ones have for it."""

    def take(self, segment: Segment, leaves: list[Tensor]) -> None:
        """Keep the gradients of what this segment began with."""


def memory_of(fresh: LayerState, rows: int) -> LayerMemory:
    """Return room for what a layer remembers in a pass of so many rows.

    Args:
        fresh: its state before anything was read.
        rows: of the pass.
    """
    if isinstance(fresh, KeyValueState):
        return AttentionMemory(fresh, rows)
    return MambaMemory(fresh)


class MambaMemory:
    """The states of a Mamba layer where segments meet, and their gradients from the right."""

    def __init__(self, fresh: MambaState) -> None:
        """Start from what a sequence that has read nothing remembers."""
        self._fresh = fresh
        self._after: dict[int, MambaState] = {}
        self._slopes: tuple[Tensor | None, Tensor | None] = (None, None)

    def states(self, segment: Segment, batch: Batch) -> list[MambaState]:
        """Return what the sequences of a segment remember before it."""
        known = self._after[segment.first].fork() if segment.continues else self._new()
        return [known, *(self._new() for _ in batch.lengths[1:])]

    def _new(self) -> MambaState:
        return MambaState(self._fresh.conv_LC, self._fresh.scan_CN)

    def keep(self, segment: Segment, states: list[MambaState]) -> None:
        """Remember what the next segment goes on from."""
        if segment.goes_on:
            self._after[segment.end] = states[-1].fork()

    def leaves(
        self, segment: Segment, batch: Batch, *, truncated: bool
    ) -> tuple[list[Tensor], list[MambaState]]:
        """Return the states before a segment, and which of them are to have gradients."""
        states = self.states(segment, batch)
        if truncated or not segment.continues:
            return [], states
        first = states[0]
        first.conv_LC = first.conv_LC.detach().requires_grad_()
        first.scan_CN = first.scan_CN.detach().requires_grad_()
        return [first.conv_LC, first.scan_CN], states

    def slopes(self, segment: Segment, states: list[MambaState]) -> Pairs:
        """Pair what this segment left with the gradient that the next one has for it."""
        last = states[-1]
        pairs = zip((last.conv_LC, last.scan_CN), self._slopes, strict=True)
        return [(x, slope) for x, slope in pairs if slope is not None and x.requires_grad]

    def take(self, segment: Segment, leaves: list[Tensor]) -> None:
        """Keep the gradients of what this segment began with, for the segment before."""
        self._slopes = (leaves[0].grad, leaves[1].grad) if leaves else (None, None)


class AttentionMemory:
    """Keys and values of all rows of an attention layer, and the sums of their gradients."""

    def __init__(self, fresh: KeyValueState, rows: int) -> None:
        """Make room for [M, G, P] keys and values, and for float32 gradients when there are any."""
        empty = fresh.tensors()["keys"]
        self._kv = [empty.new_empty((rows, *empty.shape[1:])) for _ in "kv"]
        self._slopes: list[Tensor] = []

    def states(self, segment: Segment, batch: Batch) -> list[KeyValueState]:
        """Return what the sequences of a segment remember before it."""
        known = self._new()
        if segment.continues:
            known.append(*(x[segment.began : segment.first] for x in self._kv))
        return [known, *(self._new() for _ in batch.lengths[1:])]

    def _new(self) -> KeyValueState:
        keys = self._kv[0]
        return KeyValueState(keys.shape[1], keys.shape[2], keys.dtype)

    def keep(self, segment: Segment, states: list[KeyValueState]) -> None:
        """Remember the keys and values of a segment's last sequence, if it goes on."""
        if segment.goes_on:
            new = _own_rows(segment)
            for kept, blocks in zip(self._kv, _blocks(states[-1]), strict=True):
                kept[segment.end - new : segment.end] = _last(blocks, new)

    def leaves(
        self, segment: Segment, batch: Batch, *, truncated: bool
    ) -> tuple[list[Tensor], list[KeyValueState]]:
        """Return the states before a segment, and which tensors are to have gradients."""
        if truncated or not segment.continues:
            return [], self.states(segment, batch)
        past = [x[segment.began : segment.first].detach().requires_grad_() for x in self._kv]
        known = self._new()
        known.append(*past)
        return past, [known, *(self._new() for _ in batch.lengths[1:])]

    def slopes(self, segment: Segment, states: list[KeyValueState]) -> Pairs:
        """Pair this segment's keys and values with the gradients that all later ones have."""
        if not self._slopes:
            return []
        new = _own_rows(segment)
        return [
            (blocks[-1], slope[segment.end - new : segment.end].to(blocks[-1].dtype))
            for blocks, slope in zip(_blocks(states[-1]), self._slopes, strict=True)
        ]

    def take(self, segment: Segment, leaves: list[Tensor]) -> None:
        """Add the gradients of all keys and values before this segment."""
        if not leaves:
            return
        if not self._slopes:
            self._slopes = [torch.zeros(x.shape, dtype=torch.float32) for x in self._kv]
        for slope, leaf in zip(self._slopes, leaves, strict=True):
            assert leaf.grad is not None
            slope[segment.began : segment.first] += leaf.grad


def _own_rows(segment: Segment) -> int:
    return segment.lengths[-1]


def _blocks(state: KeyValueState) -> tuple[list[Tensor], list[Tensor]]:
    return state.key_blocks(), state.value_blocks()


def _last(blocks: list[Any], count: int) -> Tensor:
    """Return the last rows of blocks laid end to end."""
    taken: list[Tensor] = []
    for block in reversed(blocks):
        taken.insert(0, block[-count:])
        count -= len(taken[0])
        if not count:
            break
    return torch.cat(taken)
