"""Ids in, more ids out: prompts read in pieces, then one token at a time, for many at once.

Knows models, states and sampling. Text it sees only to stop at a string; a tokenizer is handed in
for that. No sequence is padded and none waits for another: each leaves when it is done.

B sequences, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from jamba_lm.config_json import shown
from jamba_lm.errors import InputError
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.state import SequenceState
from jamba_lm.sampling import Sampler, Sampling, log_probabilities

if TYPE_CHECKING:
    from jamba_lm.text.tokenizer import TextStream, Tokenizer

# Tokens of prompts that one call of the model reads at most. The memory of a call grows with this
# and not with the prompt.
PREFILL_TOKENS = 512

FinishReason = Literal["length", "stop_id", "stop_string"]
ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to be continued.

    Attributes:
        prompt_ids: what the model is to read first; at least one token.
        max_new_tokens: stop after this many.
        sampling: how tokens are picked.
        stop_ids: stop after picking one of these. It is yielded, without text.
        stop_strings: stop when the text of the answer holds one of these; it and what follows are
            not part of the text. Needs a tokenizer.
        num_logprobs: None for no log-probabilities, else how many of the likeliest tokens to
            list beside the one picked.
        state: a state to continue, which is moved forward in place; None starts afresh. Afterwards
            it has read the prompt and all new tokens but the last.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    num_logprobs: int | None = None
    state: SequenceState | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedToken:
    """One more token of a sequence.

    Attributes:
        id: the token.
        text: what may now be shown. Empty while a character is incomplete or the text may be the
            beginning of a stop string, and always when there is no tokenizer.
        finish_reason: why this was the last token; None when it was not.
        logprob: natural logarithm of the probability that the model itself gave the token, before
            temperature and filters; None unless asked for.
        top_logprobs: the tokens it found likeliest, likeliest first, with theirs.
    """

    id: int
    text: str = ""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    num_logprobs: int | None = None,
    state: SequenceState | None = None,
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
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    on_prefill: ReportProgress | None = None,
) -> Iterator[tuple[int, GeneratedToken]]:
    """Continue several sequences together, yielding (index of the request, token).

    Every call of the model takes one token of each sequence that is being continued and, from
    those still reading, pieces of prompts. A prompt is cut at the same places whoever else is
    there, and draws are a sequence's own: the company changes nothing but floating-point rounding.

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
    sequences = [_Sequence(model, request, tokenizer) for request in requests]
    return _run(model, sequences, prefill_tokens, on_prefill)


def read_ids(
    model: LanguageModel,
    ids: Sequence[int],
    state: SequenceState,
    *,
    prefill_tokens: int = PREFILL_TOKENS,
    on_prefill: ReportProgress | None = None,
) -> Tensor:
    """Let `state` read `ids` in pieces, and return the logits after the last one, float32 [V].

    Raises:
        InputError: no ids, or one out of range; nothing was read then.
    """
    ids = require_ids(ids, model.config.vocab_size)
    for start in range(0, len(ids), prefill_tokens):
        piece = ids[start : start + prefill_tokens]
        logits_BV = model.next_logits([piece], [state])
        if on_prefill is not None:
            on_prefill(start + len(piece), len(ids))
    return logits_BV[0]


def require_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return `ids` as a list if a model of this vocabulary can read them.

    A prompt is checked whole before any of it is read: a mistake at its end must not cost the time
    of reading the rest.

    Raises:
        InputError: no ids, or one that is no integer or out of range.
    """
    checked = []
    for place, given in enumerate(ids):
        try:
            token = operator.index(given)
        except TypeError as error:
            raise InputError(
                f"prompt id {place} is {shown(given)}: expected an int; encode text first"
            ) from error
        if not 0 <= token < vocab_size:
            raise InputError(
                f"prompt id {place} is {shown(token)}, which is out of range: "
                f"expected 0..{vocab_size - 1}; is this the model's tokenizer?"
            )
        checked.append(token)
    if not checked:
        raise InputError("the prompt is empty: expected at least one token id to continue from")
    return checked


def _run(
    model: LanguageModel,
    sequences: list[_Sequence],
    prefill_tokens: int,
    on_prefill: ReportProgress | None,
) -> Iterator[tuple[int, GeneratedToken]]:
    num_prompt = sum(len(sequence.unread) for sequence in sequences)
    running = list(enumerate(sequences))
    while running:
        work = _share_call(running, prefill_tokens)
        logits_BV = model.next_logits(
            [ids for _, _, ids in work], [sequence.state for _, sequence, _ in work]
        ).cpu()
        reading = any(sequence.reading for _, sequence, _ in work)
        for _, sequence, ids in work:
            del sequence.unread[: len(ids)]
        if reading and on_prefill is not None:
            on_prefill(num_prompt - sum(len(s.unread) for s in sequences if s.reading), num_prompt)
        for (index, sequence, _), logits_V in zip(work, logits_BV, strict=True):
            if not sequence.unread:
                yield index, sequence.extend(logits_V)
        running = [(index, sequence) for index, sequence in running if not sequence.done]


def _share_call(
    running: list[tuple[int, _Sequence]], prefill_tokens: int
) -> list[tuple[int, _Sequence, list[int]]]:
    """Choose what the next call of the model reads: (index, sequence, ids)."""
    work = []
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


class _Sequence:
    """One request on its way: what it still has to read, and what it has said."""

    def __init__(self, model: LanguageModel, request: Request, tokenizer: Tokenizer | None) -> None:
        if request.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {request.max_new_tokens}: expected at least 1")
        if request.num_logprobs is not None and request.num_logprobs < 0:
            raise InputError(f"num_logprobs is {request.num_logprobs}: expected at least 0")
        if tokenizer is None and request.stop_strings:
            raise InputError(
                "stop strings need a tokenizer: give one, or use stop_ids to stop at tokens"
            )
        vocab_size = model.config.vocab_size
        self.unread = require_ids(request.prompt_ids, vocab_size)
        self.state = model.new_state() if request.state is None else request.state
        self.reading = True
        self.done = False
        self._request = request
        self._sampler = Sampler(request.sampling, vocab_size, [*self.state.ids, *self.unread])
        self._text = None
        if tokenizer is not None:
            self._text = StoppingText(tokenizer.stream(), request.stop_strings)

    def extend(self, logits_V: Tensor) -> GeneratedToken:
        """Pick the next token, and note that it is to be read."""
        request = self._request
        token = self._sampler.pick(logits_V)
        self.reading = False
        self.unread = [token]
        text = ""
        reason: FinishReason | None = None
        if token in request.stop_ids:
            reason = "stop_id"
        elif self._text is not None:
            text = self._text.push(token)
        if self._sampler.num_picked == request.max_new_tokens:
            reason = reason or "length"
        if self._text is not None:
            if reason is not None:
                text += self._text.flush()
            if self._text.stopped:
                reason = "stop_string"
        self.done = reason is not None
        if request.num_logprobs is None:
            return GeneratedToken(id=token, text=text, finish_reason=reason)
        found = log_probabilities(logits_V, token, request.num_logprobs)
        return GeneratedToken(
            id=token,
            text=text,
            finish_reason=reason,
            logprob=found.picked,
            top_logprobs=found.top,
        )


class StoppingText:
    """Text that arrives token by token, and ends before the first stop string.

    Nothing that may turn out to be the beginning of a stop string is let out before it is certain.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, stream: TextStream, stop_strings: Sequence[str]) -> None:
        """Wrap a tokenizer's stream.

        Raises:
            InputError: a stop string is empty or not a string.
        """
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop string {stop!r}: expected a string, and not an empty one")
        self.stopped = False
        self._stream = stream
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def push(self, token: int) -> str:
        """Take one more token, and return the text that is now certain."""
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """Return what was held back: no more tokens will come."""
        text = self._release(self._stream.flush())
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _release(self, more: str) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` with which `text` ends.

    >>> overlap("the en", "end")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
