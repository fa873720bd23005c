"""Ids in, more ids out: prompts read in pieces, then one token at a time, for many at once.

Knows models, states and sampling. Text it sees only to stop at a string; a tokenizer is handed in
for that. No sequence is padded and none waits for another: each leaves when it is done.

B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jamba_lm.continuation import Continuation, require_prompt
from jamba_lm.continuation import GeneratedToken as GeneratedToken
from jamba_lm.continuation import Request as Request
from jamba_lm.drafting.policy import DraftPolicy
from jamba_lm.errors import InputError
from jamba_lm.model.sequence_memory import SequenceMemory
from jamba_lm.readable_model import ReadableModel
from jamba_lm.sampling import Floats, Sampling
from jamba_lm.stepper import Stepper

if TYPE_CHECKING:
    from jamba_lm.readable_model import Logits
    from jamba_lm.text.tokenizer import Tokenizer

# Tokens of prompts that one call of the model reads at most. The memory of a call grows with this
# and not with the prompt.
PREFILL_TOKENS = 512
# The time of a call of this many rows says what a row more costs; in a shorter one that reads a
# prompt, the first of the program as a rule, other things weigh more.
TELLING_ROWS = 64

ReportProgress = Callable[[int, int], None]


def generate(
    model: ReadableModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    num_logprobs: int | None = None,
    state: SequenceMemory[Any] | None = None,
    draft: str | None = None,
    draft_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    on_prefill: ReportProgress | None = None,
) -> Iterator[GeneratedToken]:
    """Continue one sequence, yielding each token as soon as it is picked.

    See `Request` for the arguments of the sequence and `generate_batch` for the others. Arguments
    are checked here, before the first token is asked for.

    Raises:
        InputError: an argument cannot be used.
    """
    request = Request(
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling() if sampling is None else sampling,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        num_logprobs=num_logprobs,
        state=state,
        draft=draft,
        draft_tokens=draft_tokens,
    )
    tokens = generate_batch(
        model,
        [request],
        tokenizer=tokenizer,
        prefill_tokens=prefill_tokens,
        on_prefill=on_prefill,
    )
    return (token for _, token in tokens)


def generate_batch(
    model: ReadableModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    on_prefill: ReportProgress | None = None,
) -> Iterator[tuple[int, GeneratedToken]]:
    """Continue several sequences together, yielding (index of the request, token).

    Every call of the model takes one token of each sequence that is being continued, with its
    draft if it has one, and, from those still reading, pieces of prompts. A prompt is cut at the
    same places whoever else is there, and draws are a sequence's own: the company changes nothing
    but floating-point rounding.

    Args:
        model: the model.
        requests: the sequences, at least one.
        tokenizer: gives tokens their text, which stop strings need.
        prefill_tokens: length of the pieces in which prompts are read.
        on_prefill: called after every call that read from a prompt, with the prompt tokens read so
            far and in all. The states are consistent then, so it may raise to stop.

    Raises:
        InputError: an argument cannot be used.
    """
    if not requests:
        raise InputError("no requests given: expected at least one")
    if prefill_tokens < 1:
        raise InputError(f"prefill_tokens is {prefill_tokens}: expected at least 1")
    states = [request.state for request in requests if request.state is not None]
    if len({id(state) for state in states}) != len(states):
        raise InputError(
            "the same state was given for two requests: fork() it, so that each moves on its own"
        )
    sequences = [Continuation(model, request, tokenizer) for request in requests]
    return _run(model, sequences, prefill_tokens, on_prefill)


def read_ids(
    model: ReadableModel,
    ids: Sequence[int],
    state: SequenceMemory[Any],
    *,
    prefill_tokens: int = PREFILL_TOKENS,
    on_prefill: ReportProgress | None = None,
) -> Logits:
    """Let `state` read `ids` in pieces, and return the logits after the last one, float32 [V].

    Raises:
        InputError: no ids, or one out of range; nothing was read then.
    """
    ids = require_prompt(ids, model.config.vocab_size)
    for start in range(0, len(ids), prefill_tokens):
        piece = ids[start : start + prefill_tokens]
        logits_BV = model.next_logits([piece], [state])
        if on_prefill is not None:
            on_prefill(start + len(piece), len(ids))
    return logits_BV[0]


def _run(
    model: ReadableModel,
    sequences: list[Continuation],
    prefill_tokens: int,
    on_prefill: ReportProgress | None,
) -> Iterator[tuple[int, GeneratedToken]]:
    num_prompt = sum(len(sequence.unread) for sequence in sequences)
    running = list(enumerate(sequences))
    stepper = Stepper(model)
    policy = DraftPolicy() if any(sequence.drafts for sequence in sequences) else None
    # Calls for which nobody thinks of a draft: they are as without, and nobody is asked again.
    resting = 0
    while running:
        if policy is not None and not resting:
            resting = min(sequence.tokens_to_rest for _, sequence in running)
        drafting = None if resting else policy
        resting -= resting > 0
        work = _share_call(running, prefill_tokens, drafting)
        started = time.perf_counter()
        logits = _read(stepper, work)
        seconds = time.perf_counter() - started
        reading = any(sequence.reading for _, sequence, _ in work)
        for _, sequence, ids in work:
            if sequence.reading:
                del sequence.unread[: len(ids)]
        if reading and on_prefill is not None:
            on_prefill(num_prompt - sum(len(s.unread) for s in sequences if s.reading), num_prompt)
        written = [
            (index, sequence, sequence.extend(rows))
            for (index, sequence, _), rows in zip(work, logits, strict=True)
            if not (sequence.reading and sequence.unread)
        ]
        if drafting is not None:
            rows = sum(len(ids) for _, _, ids in work)
            if not reading:
                num_written = sum(len(tokens) for _, _, tokens in written)
                drafting.observe(rows, seconds, sequences=len(work), written=num_written)
            elif rows >= TELLING_ROWS:
                drafting.times.observe(rows, seconds)
        for index, sequence, tokens in written:
            for token in tokens[:-1]:
                yield index, token
            sequence.settle(model)
            yield index, tokens[-1]
        running = [(index, sequence) for index, sequence in running if not sequence.done]


_Work = list[tuple[int, Continuation, list[int]]]


def _share_call(
    running: list[tuple[int, Continuation]], prefill_tokens: int, policy: DraftPolicy | None
) -> _Work:
    """Choose what the next call of the model reads: (index, sequence, ids)."""
    work: _Work = []
    if policy is not None and not any(sequence.reading for _, sequence in running):
        lengths = policy.choose([sequence.wish() for _, sequence in running])
        for (index, sequence), length in zip(running, lengths, strict=True):
            work.append((index, sequence, [*sequence.unread, *sequence.make_draft(length)]))
        return work
    # Nobody drafts beside a prompt: the call is a long one, and its time would tell nothing.
    room = prefill_tokens
    for index, sequence in running:
        if not sequence.reading:
            work.append((index, sequence, list(sequence.unread)))
            continue
        # The first prompt in line gets its whole piece, and others only if theirs fits as well: a
        # piece never shrinks because of company.
        piece = sequence.unread[:prefill_tokens]
        if len(piece) <= room:
            work.append((index, sequence, piece))
            room -= len(piece)
    return work


def _read(stepper: Stepper, work: _Work) -> list[list[Floats]]:
    """Let the model read, and return the logits after the last token and the drafted ones."""
    ids = [ids for _, _, ids in work]
    states = [sequence.state_to_move() for _, sequence, _ in work]
    counts = [1 + len(sequence.draft) for _, sequence, _ in work]
    return stepper.read(ids, counts, states)
