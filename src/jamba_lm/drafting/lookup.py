"""Drafts for one sequence by looking up what followed its last tokens before.

Paper: speculative decoding (arXiv 2211.17192) without its second model; "prompt lookup" in
transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jamba_lm.drafting.acceptance import AcceptanceRates
from jamba_lm.drafting.policy import LONGEST_DRAFT, Wish
from jamba_lm.drafting.suffix_index import SuffixIndex

# After so many calls without a draft, new tokens are looked at so many together. The weights of a
# step push everything else out of the caches, so that looking takes several times as long as it
# does by itself (33 microseconds in place of 7), and for eight tokens little longer than for one.
IDLE_CALLS, TOGETHER = 16, 8


class DraftCounts(NamedTuple):
    """What drafting did for a sequence so far.

    Attributes:
        proposed: tokens that were drafted.
        accepted: tokens among them that the model wrote as well.
        calls: calls of the model that wrote all tokens so far, drafted or not.
    """

    proposed: int
    accepted: int
    calls: int


class LookupDrafter:
    """Guesses the next tokens of a sequence from the prompt and what was written since."""

    def __init__(self, ids: Iterable[int], *, fixed: int | None = None) -> None:
        """Begin with the tokens of the prompt.

        Args:
            ids: the tokens read so far.
            fixed: draft this many tokens wherever there is a match; None to draft as many as pay.
        """
        self._index = SuffixIndex(ids)
        self._rates = AcceptanceRates()
        self._fixed = fixed
        # Written, and not looked at yet.
        self._waiting: list[int] = []
        self._idle_calls = 0
        # Whether the call before had a draft, which its tokens have paid for or not.
        self._drafted = False

    @property
    def tokens_to_rest(self) -> int:
        """How many more tokens nothing is looked up for, since text so far repeats nothing."""
        if self._idle_calls < IDLE_CALLS:
            return 0
        return max(0, TOGETHER - len(self._waiting))

    def wish(self, unread: int, most: int) -> Wish:
        """Say what could be drafted, at most `most` tokens, beside the `unread` ones to be read."""
        if self.tokens_to_rest:
            return Wish(unread)
        hits = self._look()
        if self._drafted:
            # Those are on the account as what they gained.
            hits, self._drafted = 0, False
        match = self._index.find()
        if self._fixed is not None:
            return Wish(unread, fixed=0 if match is None else min(self._fixed, most))
        self._idle_calls += 1
        if match is None or most < 1:
            return Wish(unread, hits=hits)
        chances = self._rates.chances(match.length, min(most, LONGEST_DRAFT))
        return Wish(unread, chances, hits=hits)

    def draft(self, count: int) -> list[int]:
        """Return the `count` likeliest next tokens; a wish for them must have come before."""
        if not count:
            return []
        self._idle_calls, self._drafted = 0, True
        match = self._index.find()
        if match is None:
            return []
        return self._index.following(match, count)

    def push(self, token: int) -> None:
        """Take one more token of the sequence."""
        self._waiting.append(token)

    def _look(self) -> int:
        """Put the tokens that wait into the index, and learn which would have been guessed.

        Returns how many would have been.
        """
        hits = 0
        for token in self._waiting:
            match = self._index.find()
            if match is not None:
                hit = self._index[match.start] == token
                self._rates.observe(match.length, hit)
                hits += hit
            self._index.append(token)
        self._waiting.clear()
        return hits
