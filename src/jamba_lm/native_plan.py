"""A described model that is ready to run: a few tokens of several sequences in one native call.

Knows what sequences remember, and nothing of where weights come from. Needs no torch.

M rows, B sequences, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from jamba_lm.kernels.native_layers import Floats, StepModel
from jamba_lm.kernels.native_step import KeyMemory, MambaMemory, run_step
from jamba_lm.kernels.part_times import PartTimes
from jamba_lm.model.sequence_memory import LayerMemory, RecurrentMemory, SequenceMemory

L = TypeVar("L", bound=LayerMemory)


class NativePlan(ABC):
    """A model ready for steps of at most `STEP_ROWS` tokens, and for prompts of any length.

    Attributes:
        model: as it was described to the native code.
        times: what calls add to while somebody asks where the time goes (`timed`); else None.
    """

    def __init__(self, model: StepModel) -> None:
        """Hold a description."""
        self.model = model
        self.times: PartTimes | None = None

    @property
    @abstractmethod
    def threads(self) -> int:
        """How many threads the next call is to use."""

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceMemory[Any]],
        logit_rows: Sequence[int],
        *,
        path: str | None = None,
    ) -> Floats:
        """Read at most `STEP_ROWS` tokens and return logits, `[len(logit_rows), V]`.

        States move past the tokens together, after the last layer.

        Args:
            sequences: token ids, in range, none of the lists empty.
            states: one each, all different.
            logit_rows: among the rows of all sequences laid end to end.
            path: forces an instruction set, for tests.
        """
        memories, after = plan_memories(states, [len(ids) for ids in sequences])
        offsets = [0]
        for ids in sequences:
            offsets.append(offsets[-1] + len(ids))
        ids_M = [one for ids in sequences for one in ids]
        logits = run_step(
            self.model,
            ids_M,
            offsets,
            memories,
            logit_rows,
            threads=self.threads,
            path=path,
            times=self.times,
        )
        for ids, state, layers in zip(sequences, states, after, strict=True):
            state.advance(layers, ids)
        return logits


@contextmanager
def timed(plan: NativePlan) -> Iterator[PartTimes]:
    """Have every call of `plan` say where its time went, meanwhile.

    A `Stepper` asks when it meets its sequences: one that is made within keeps telling.
    """
    plan.times = PartTimes(plan.threads)
    try:
        yield plan.times
    finally:
        plan.times = None


def plan_memories(
    states: Sequence[SequenceMemory[L]], lengths: Sequence[int]
) -> tuple[list[MambaMemory | KeyMemory], list[list[L]]]:
    """Make room for what each of `states` will remember after `lengths` more tokens.

    Returns:
        What the native code reads and writes, layer by layer and within a layer sequence by
        sequence, and the layers of each state after it.
    """
    after = [
        [_layer_after(layer, length) for layer in state.layers]
        for state, length in zip(states, lengths, strict=True)
    ]
    memories = [
        _memory(state.layers[index], layers[index])
        for index in range(len(states[0].layers))
        for state, layers in zip(states, after, strict=True)
    ]
    return memories, after


def _layer_after(layer: L, num_tokens: int) -> L:
    if isinstance(layer, RecurrentMemory):
        return layer.blank()
    after = layer.fork()
    after.reserve(num_tokens)
    return after


def _memory(before: LayerMemory, after: LayerMemory) -> MambaMemory | KeyMemory:
    if isinstance(before, RecurrentMemory) and isinstance(after, RecurrentMemory):
        return MambaMemory(before.addresses, after.addresses)
    assert not isinstance(after, RecurrentMemory)
    return KeyMemory(after.block_addresses())
