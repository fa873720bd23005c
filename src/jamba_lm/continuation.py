"""One request on its way: what is asked for, what comes out, and what was read and said so far.

Knows one sequence; which sequences share a call of the model is the affair of `generation.py`.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from jamba_lm.config_json import shown
from jamba_lm.drafting.lookup import DraftCounts, LookupDrafter
from jamba_lm.drafting.policy import LONGEST_DRAFT, Wish
from jamba_lm.errors import InputError
from jamba_lm.model.call_arguments import require_ids
from jamba_lm.model.sequence_memory import SequenceMemory
from jamba_lm.readable_model import ReadableModel
from jamba_lm.sampling import Floats, Sampler, Sampling, log_probabilities
from jamba_lm.text.stopping import StoppingText

if TYPE_CHECKING:
    from jamba_lm.text.tokenizer import Tokenizer

DRAFTS = ("lookup",)

FinishReason = Literal["length", "stop_id", "stop_string"]


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
            it has read the prompt and all new tokens but the last. When a draft is given up in the
            middle, it may have read fewer of them, `state.ids` tells which; never more.
        draft: "lookup" guesses tokens from what followed the last ones before, in the prompt or
            the answer, and lets the model check several in one call; None writes one at a time.
            The text is the same: every token is picked from the model's logits with the same
            draws, and a guess that is not what was picked is thrown away. This takes for granted
            that the logits after a token do not depend on how many rows a call has, which is so in
            a native step. Where they do, in the last bits, a near tie may fall the other way, and
            the text is still drawn from the model's own distribution.
        draft_tokens: draft this many wherever something was found, or as many as go into a call of
            16 rows; None drafts as many as measurements, taken on the way, promise to be worth
            their time.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    num_logprobs: int | None = None
    state: SequenceMemory[Any] | None = None
    draft: str | None = None
    draft_tokens: int | None = None


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
        drafting: what drafting did for this sequence, up to the call that gave this token; None
            without.
    """

    id: int
    text: str = ""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafting: DraftCounts | None = None


class Continuation:
    """One request on its way: what it still has to read, and what it has said."""

    def __init__(self, model: ReadableModel, request: Request, tokenizer: Tokenizer | None) -> None:
        _check(request, tokenizer)
        vocab_size = model.config.vocab_size
        self.unread = require_prompt(request.prompt_ids, vocab_size)
        self.state = model.new_state() if request.state is None else request.state
        self.draft: list[int] = []
        self.reading = True
        self.done = False
        self._request = request
        self._ahead: SequenceMemory[Any] | None = None
        self._picked: list[int] = []
        self._num_drafted = self._num_accepted = self._num_calls = 0
        read = [*self.state.ids, *self.unread]
        self._sampler = Sampler(request.sampling, vocab_size, read)
        self._drafter = None
        if request.draft is not None:
            self._drafter = LookupDrafter(read, fixed=request.draft_tokens)
        self._text = None
        if tokenizer is not None:
            self._text = StoppingText(tokenizer.stream(), request.stop_strings)

    @property
    def drafts(self) -> bool:
        """Whether it was asked to draft."""
        return self._drafter is not None

    @property
    def tokens_to_rest(self) -> int:
        """How many more tokens it writes without a thought of a draft; 1 where it never drafts."""
        return 1 if self._drafter is None else self._drafter.tokens_to_rest

    def wish(self) -> Wish:
        """Say what the next call is to read, and what could be drafted."""
        if self._drafter is None:
            return Wish(len(self.unread))
        # The call gives a token more than the draft has.
        most = self._request.max_new_tokens - self._sampler.num_picked - 1
        return self._drafter.wish(len(self.unread), most)

    def make_draft(self, length: int) -> list[int]:
        """Guess this many tokens, or as many as can be guessed."""
        self.draft = [] if self._drafter is None else self._drafter.draft(length)
        return self.draft

    def state_to_move(self) -> SequenceMemory[Any]:
        """Return the state that is to read: with a draft a fork, which may go too far."""
        if not self.draft:
            return self.state
        self._ahead = self.state.fork()
        return self._ahead

    def extend(self, logits: Sequence[Floats]) -> list[GeneratedToken]:
        """Pick tokens, from each row [V] of `logits` one, until a guess turns out wrong."""
        self.reading = False
        self._num_calls += 1
        if not self.draft:
            (logits_V,) = logits
            return [self._pick(logits_V, self._counts())]
        picked: list[GeneratedToken] = []
        for logits_V, guess in zip(logits, [*self.draft, None], strict=True):
            token = self._pick(logits_V)
            self._num_accepted += token.id == guess
            picked.append(token)
            if self.done or token.id != guess:
                break
        self._num_drafted += len(self.draft)
        counts = self._counts()
        return [replace(token, drafting=counts) for token in picked]

    def _counts(self) -> DraftCounts | None:
        if self._drafter is None:
            return None
        return DraftCounts(self._num_drafted, self._num_accepted, self._num_calls)

    def settle(self, model: ReadableModel) -> None:
        """Let the state take over what was read and is true, once all but the last was given out.

        After a guess that was wrong it goes back to where it was, which costs nothing, and what was
        right is read again in front of the next tokens: a call for that alone would read the whole
        model for a few rows.
        """
        ahead, picked = self._ahead, self._picked
        self._ahead, self._picked = None, []
        if ahead is not None and len(picked) <= len(self.draft):
            self.state.discard(ahead)
            self.unread += picked
        else:
            if ahead is not None:
                self.state.take_over(ahead)
            self.unread = picked[-1:]
        self.draft = []
        if self.done and self._request.state is not None and self.unread[:-1]:
            model.next_logits([self.unread[:-1]], [self.state])
            self.unread = self.unread[-1:]

    def _pick(self, logits_V: Floats, drafting: DraftCounts | None = None) -> GeneratedToken:
        request = self._request
        token = self._sampler.pick(logits_V)
        self._picked.append(token)
        if self._drafter is not None:
            self._drafter.push(token)
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
            return GeneratedToken(id=token, text=text, finish_reason=reason, drafting=drafting)
        found = log_probabilities(logits_V, token, request.num_logprobs)
        return GeneratedToken(
            id=token,
            text=text,
            finish_reason=reason,
            logprob=found.picked,
            top_logprobs=found.top,
            drafting=drafting,
        )


def require_prompt(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return `ids` as a list if a model of this vocabulary can continue them.

    A prompt is checked whole before any of it is read: a mistake at its end must not cost the time
    of reading the rest.

    Raises:
        InputError: no ids, or one that is no integer or out of range.
    """
    checked = require_ids(ids, vocab_size, "prompt id")
    if not checked:
        raise InputError("the prompt is empty: expected at least one token id to continue from")
    return checked


def _check(request: Request, tokenizer: Tokenizer | None) -> None:
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {request.max_new_tokens}: expected at least 1")
    if request.num_logprobs is not None and request.num_logprobs < 0:
        raise InputError(f"num_logprobs is {request.num_logprobs}: expected at least 0")
    if tokenizer is None and request.stop_strings:
        raise InputError(
            "stop strings need a tokenizer: give one, or use stop_ids to stop at tokens"
        )
    if request.draft is not None and request.draft not in DRAFTS:
        raise InputError(
            f"draft is {shown(request.draft)}: expected {' or '.join(DRAFTS)}, or nothing to write "
            "one token at a time"
        )
    if request.draft_tokens is not None:
        if request.draft is None:
            raise InputError("draft_tokens is given without draft: say how to draft as well")
        if not 1 <= request.draft_tokens <= LONGEST_DRAFT:
            raise InputError(
                f"draft_tokens is {request.draft_tokens}: expected 1 to {LONGEST_DRAFT}"
            )
