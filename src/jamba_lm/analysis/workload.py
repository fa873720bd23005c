"""What a measurement of speed lets a model do: read prompts together, then write together.

`jamba bench` runs it on a whole model, `prediction` on single layers. Knows no clock but the one on
the wall.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from jamba_lm.drafting.lookup import DraftCounts
from jamba_lm.generation import Request, generate_batch
from jamba_lm.readable_model import ReadableModel
from jamba_lm.stepper import Stepper


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
    """Seconds that one repetition took, the bytes of its states at the end, and what it drafted."""

    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    drafting: DraftCounts | None = None


def run_once(model: ReadableModel, workload: Workload) -> Timing:
    """Let fresh sequences read their prompts together, and then write together.

    Prompts are random tokens, and the likeliest token is taken each time.
    """
    size = workload.batch, workload.num_prompt_tokens
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=size).tolist()
    states = [model.new_state() for _ in prompts]

    started = time.perf_counter()
    for first in range(0, workload.num_prompt_tokens, workload.piece):
        pieces = [ids[first : first + workload.piece] for ids in prompts]
        logits_BV = model.next_logits(pieces, states)
    picked = np.asarray(logits_BV).argmax(axis=-1).tolist()
    read = time.perf_counter()
    if workload.draft is not None:
        requests = [
            Request(
                prompt_ids=[token],
                max_new_tokens=workload.num_new_tokens,
                state=state,
                draft=workload.draft,
            )
            for token, state in zip(picked, states, strict=True)
        ]
        last = {index: token.drafting for index, token in generate_batch(model, requests)}
        written = time.perf_counter()
        found = [counts for counts in last.values() if counts is not None]
        drafting = DraftCounts(
            proposed=sum(counts.proposed for counts in found),
            accepted=sum(counts.accepted for counts in found),
            calls=max(counts.calls for counts in found),
        )
        num_bytes = sum(state.num_bytes for state in states)
        return Timing(read - started, written - read, num_bytes, drafting)
    stepper, one_each = Stepper(model), [1] * workload.batch
    for _ in range(workload.num_new_tokens):
        logits = stepper.read([[token] for token in picked], one_each, states)
        picked = [int(logits_V.argmax()) for (logits_V,) in logits]
    written = time.perf_counter()
    return Timing(read - started, written - read, sum(state.num_bytes for state in states))
