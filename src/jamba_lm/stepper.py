"""Takes sequences forward call after call, as a decode loop does, with little done in between.

A step of a small model is a millisecond, and its weights push everything else out of the caches:
what a step does in Python costs ten times what it costs when it is measured alone. So the loop
describes its sequences to the native step once, and the memory of Mamba layers is used again.

Knows states and the plan of a step; does not know what is done with the logits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

import numpy as np

from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_step import MEMORY_WORDS, STEP_ROWS, StepCall, address_of, words
from jamba_lm.model.sequence_memory import (
    KeyValueChain,
    LayerMemory,
    Loan,
    RecurrentMemory,
    SequenceMemory,
)
from jamba_lm.native_plan import NativePlan
from jamba_lm.readable_model import ReadableModel

States = Sequence[SequenceMemory[Any]]

# Looking for changes of the weights takes as long as all else around a step.
CALLS_BETWEEN_CHECKS = 32


class Stepper:
    """Reads tokens for one loop, and moves states in memory that it uses again.

    The states are ordinary ones: they may be forked, saved, or moved by others in between. Changes
    of the model's weights are noticed when a stepper is made, and within 32 calls after that.
    Not for two threads at once.
    """

    def __init__(self, model: ReadableModel) -> None:
        """Begin with a model, and no sequence yet."""
        self._model = model
        self._plan: NativePlan | str | None = None
        self._until_check = 0
        self._company = _Company()

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        counts: list[int],
        states: States,
    ) -> list[list[Floats]]:
        """Read several sequences, and return the logits after the last few tokens of each.

        Args:
            sequences: lists of token ids, all in range, none of them empty.
            counts: after how many of its last tokens, for each sequence.
            states: one each, all different; they move forward.

        Returns:
            For each sequence `counts_i` rows [V], which are overwritten by the next call.
        """
        lengths = list(map(len, sequences))
        if self._until_check == 0 or not self._company.knows(states):
            self._meet(states)
        self._until_check -= 1
        if isinstance(self._plan, str) or sum(lengths) > STEP_ROWS:
            found = self._model.last_logits(sequences, counts, states)
            return [list(np.asarray(logits)) for logits in found]
        if (lengths, counts) != self._arranged:
            self._arrange(lengths, list(counts))
        memories = self._company.prepare(lengths)
        self._call.run([token for ids in sequences for token in ids], memories)
        self._company.move(sequences, states)
        return self._logits

    def _meet(self, states: States) -> None:
        """Look whether the model has changed; the plan may only be told of states that fit it."""
        self._model.require_states(states)
        plan = self._model.step_plan()
        if plan is not self._plan and isinstance(plan, NativePlan):
            self._call = StepCall(plan.model, plan.threads, times=plan.times)
            self._arranged: tuple[list[int], list[int]] | None = None
            self._company = _Company()
        self._plan = plan
        self._until_check = CALLS_BETWEEN_CHECKS
        if isinstance(plan, NativePlan) and not self._company.knows(states):
            self._company.meet(states)

    def _arrange(self, lengths: list[int], counts: list[int]) -> None:
        """Make room for the logits, and tell the native step which rows belong to whom."""
        offsets = [0, *accumulate(lengths)]
        rows = [
            row
            for end, count in zip(offsets[1:], counts, strict=True)
            for row in range(end - count, end)
        ]
        logits = np.empty((len(rows), self._model.config.vocab_size), dtype=np.float32)
        self._call.arrange(offsets, rows, logits.ctypes.data)
        one_each = iter(logits)
        self._logits = [list(islice(one_each, count)) for count in counts]
        self._arranged = (lengths, counts)


class _Place:
    """One of two places of a sequence: a step reads what is in one and writes the other.

    Attributes:
        layers: as the state has them when it is here.
        loan: a place that was given away is never written again.
        attention: those of `layers` that are attention.
        addresses: of convolution window and scan state of each layer; 0 of attention, which has
            blocks of its own.
    """

    __slots__ = ("addresses", "attention", "layers", "loan")

    def __init__(self, layers: list[LayerMemory], loan: Loan) -> None:
        self.layers = layers
        self.loan = loan
        self.attention = [one for one in layers if isinstance(one, KeyValueChain)]
        self.addresses = [
            one.addresses if isinstance(one, RecurrentMemory) else (0, 0) for one in layers
        ]

    @classmethod
    def empty(cls, like: Sequence[LayerMemory]) -> _Place:
        """Return a place with memory of its own, for a state with layers like these."""
        loan = Loan(given=False)
        layers = [
            one.blank(loan) if isinstance(one, RecurrentMemory) else one.fork() for one in like
        ]
        return cls(layers, loan)


class _Company:
    """The sequences of the last call: where they are, and where the next one takes them."""

    def __init__(self) -> None:
        self._here: list[_Place] = []
        self._there: list[_Place] = []
        # Whether the states are here: not while a step is under way, nor after it failed.
        self._settled = False
        # The words of `jamba_memory`, [layer][sequence], from here to there, and back again; none
        # until they are needed.
        self._words = self._words_back = words(())
        # Where among them each attention layer begins, and the blocks of each sequence in it.
        self._attention: list[int] = []
        self._blocks: list[array[int]] = []

    def knows(self, states: States) -> bool:
        """Say whether these are the sequences, nobody moved them and nobody took a copy."""
        if not self._settled or len(states) != len(self._here):
            return False
        for state, here, there in zip(states, self._here, self._there, strict=True):
            if state.layers is not here.layers or there.loan.given:
                return False
        return True

    def prepare(self, lengths: list[int]) -> int:
        """Make room for what the states will remember; return where the native step is told."""
        self._settled = False
        described = len(self._words) > 0
        if not described:
            self._words = self._described()
        slot = 0
        for layer, place in enumerate(self._attention):
            for length, here, there in zip(lengths, self._here, self._there, strict=True):
                after = there.attention[layer]
                in_last = after.follow(here.attention[layer], length)
                if described and in_last:
                    self._blocks[slot][-1] = in_last
                else:
                    self._blocks[slot] = words(after.block_addresses())
                    self._tell(place, self._blocks[slot])
                place += MEMORY_WORDS
                slot += 1
        return address_of(self._words)

    def move(self, sequences: Sequence[Sequence[int]], states: States) -> None:
        """Let the states be where the step has written."""
        for ids, state, there in zip(sequences, states, self._there, strict=True):
            state.advance(there.layers, ids)
        self._here, self._there = self._there, self._here
        self._words, self._words_back = self._words_back, self._words
        self._settled = True

    def meet(self, states: States) -> None:
        """Find places for these sequences: those they had, as far as they are still their own."""
        pairs = zip(self._here, self._there, strict=True)
        had = {id(here.layers): (here, there) for here, there in pairs}
        self._here, self._there = [], []
        for state in states:
            here, there = had.get(id(state.layers), (None, None))
            if here is None:
                # What somebody else has made is only read.
                here = _Place(state.layers, Loan(given=True))
            if there is None or there.loan.given:
                there = _Place.empty(state.layers)
            self._here.append(here)
            self._there.append(there)
        size = len(states) * MEMORY_WORDS
        self._attention = [
            index * size
            for index, one in enumerate(states[0].layers)
            if isinstance(one, KeyValueChain)
        ]
        self._blocks = [words(())] * (len(self._attention) * len(states))
        self._words = self._words_back = words(())
        self._settled = True

    def _described(self) -> array[int]:
        return words(
            number
            for index in range(len(self._here[0].layers))
            for here, there in zip(self._here, self._there, strict=True)
            for number in (*here.addresses[index], *there.addresses[index], 0, 0)
        )

    def _tell(self, place: int, blocks: array[int]) -> None:
        for numbers in (self._words, self._words_back):
            if numbers:
                numbers[place + 4] = len(blocks) // 3
                numbers[place + 5] = address_of(blocks)
