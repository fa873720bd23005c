"""What a measurement of speed lets a model do: read prompts together, then write together.

`jamba bench` runs it on a whole model, `prediction` on single layers. Knows no clock but the one on
the wall.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jamba_lm.drafting.lookup import DraftCounts
from jamba_lm.errors import InputError
from jamba_lm.generation import Request, generate_batch
from jamba_lm.kernels.part_times import PartTime, PartTimes
from jamba_lm.native_plan import NativePlan, timed
from jamba_lm.readable_model import ReadableModel
from jamba_lm.stepper import Stepper

Parts = dict[str, PartTime]


@dataclass(frozen=True, slots=True)
class Workload:
    """What one repetition does.

    Attributes:
        num_prompt_tokens: tokens each sequence reads.
        num_new_tokens: tokens each sequence then writes.
        batch: sequences at the same time.
        prefill_tokens: tokens read in one call, all sequences together.
        draft: how they draft, as in `generation.Request`; None to write one token at a time.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    batch: int
    prefill_tokens: int
    draft: str | None = None

    @property
    def piece(self) -> int:
        """Tokens of each sequence in one call that reads."""
        return max(1, self.prefill_tokens // self.batch)


@dataclass(frozen=True, slots=True)
class Timing:
    """What one repetition took.

    Attributes:
        prefill_seconds: to read the prompts.
        decode_seconds: to write what follows.
        state_bytes: of its states at the end.
        drafting: what it drafted; None where it did not.
        prefill_parts: seconds of each part of the model in `prefill_seconds`; what is missing from
            them was spent around the native calls. None where nobody asked.
        decode_parts: likewise.
    """

    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    drafting: DraftCounts | None = None
    prefill_parts: Parts | None = None
    decode_parts: Parts | None = None


def plan_with_parts(model: ReadableModel) -> NativePlan:
    """Return the plan of a model whose calls can say where their time goes.

    Raises:
        InputError: the model is not read by native calls, which alone can tell.
    """
    plan = model.step_plan()
    if isinstance(plan, str):
        raise InputError(f"only native calls say where their time goes: {plan}")
    return plan


def run_by_parts(model: ReadableModel, workload: Workload) -> Timing:
    """Do the same as `run_once`, and ask every native call where its time went.

    Raises:
        InputError: as in `plan_with_parts`.
    """
    with timed(plan_with_parts(model)) as times:
        return run_once(model, workload, times)


class _Sequences:
    """The sequences of one repetition: random prompts, and the likeliest token each time."""

    def __init__(self, model: ReadableModel, workload: Workload) -> None:
        size = workload.batch, workload.num_prompt_tokens
        vocab_size = model.config.vocab_size
        self._prompts = np.random.default_rng(0).integers(vocab_size, size=size).tolist()
        self._model, self._workload = model, workload
        self._one_each = [1] * workload.batch
        self.states = [model.new_state() for _ in self._prompts]
        self.picked: list[int] = []

    def read(self) -> None:
        """Read the prompts, piece by piece."""
        for first in range(0, self._workload.num_prompt_tokens, self._workload.piece):
            pieces = [ids[first : first + self._workload.piece] for ids in self._prompts]
            logits_BV = self._model.next_logits(pieces, self.states)
        self.picked = np.asarray(logits_BV).argmax(axis=-1).tolist()

    def begin_writing(self) -> None:
        self._stepper = Stepper(self._model)

    def write(self) -> None:
        """Write a token each."""
        ids = [[token] for token in self.picked]
        logits = self._stepper.read(ids, self._one_each, self.states)
        self.picked = [int(logits_V.argmax()) for (logits_V,) in logits]

    def num_bytes(self) -> int:
        return sum(state.num_bytes for state in self.states)


def run_once(model: ReadableModel, workload: Workload, times: PartTimes | None = None) -> Timing:
    """Let fresh sequences read their prompts together, and then write together.

    Prompts are random tokens, and the likeliest token is taken each time.

    Args:
        model: what runs.
        workload: what it does.
        times: what native calls add their times to, where somebody asks.
    """
    sequences = _Sequences(model, workload)
    started = time.perf_counter()
    sequences.read()
    read = time.perf_counter()
    prefill_parts = take_parts(times)
    if workload.draft is not None:
        requests = [
            Request(
                prompt_ids=[token],
                max_new_tokens=workload.num_new_tokens,
                state=state,
                draft=workload.draft,
            )
            for token, state in zip(sequences.picked, sequences.states, strict=True)
        ]
        last = {index: token.drafting for index, token in generate_batch(model, requests)}
        written = time.perf_counter()
        found = [counts for counts in last.values() if counts is not None]
        drafting = DraftCounts(
            proposed=sum(counts.proposed for counts in found),
            accepted=sum(counts.accepted for counts in found),
            calls=max(counts.calls for counts in found),
        )
        num_bytes = sequences.num_bytes()
        return Timing(
            read - started, written - read, num_bytes, drafting, prefill_parts, take_parts(times)
        )
    sequences.begin_writing()
    for _ in range(workload.num_new_tokens):
        sequences.write()
    written = time.perf_counter()
    num_bytes = sequences.num_bytes()
    return Timing(read - started, written - read, num_bytes, None, prefill_parts, take_parts(times))


def run_in_turns(models: Sequence[ReadableModel], workload: Workload) -> Timing:
    """Let every model do what `run_once` lets one do, each writing a token in its turn.

    Returns:
        Seconds and bytes of one model, on the average. Nothing is drafted.
    """
    all_sequences = [_Sequences(model, workload) for model in models]
    started = time.perf_counter()
    for sequences in all_sequences:
        sequences.read()
    read = time.perf_counter()
    for sequences in all_sequences:
        sequences.begin_writing()
    for _ in range(workload.num_new_tokens):
        for sequences in all_sequences:
            sequences.write()
    written = time.perf_counter()
    num_bytes = sum(sequences.num_bytes() for sequences in all_sequences)
    count = len(models)
    return Timing((read - started) / count, (written - read) / count, num_bytes // count)


def take_parts(times: PartTimes | None) -> Parts | None:
    """Return the seconds of each part so far, and begin anew."""
    if times is None:
        return None
    parts = times.parts()
    times.clear()
    return parts
