"""Finds added tokens in a text, and keeps a text from making the ones that steer a model.

Knows nothing about messages or templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jamba_lm.errors import InputError
from jamba_lm.text.tokenizer_file import AddedToken

# <think>, </tool_call>: markup that templates look for in a text.
TAG = re.compile(r"</?\w+>")
# Unicode promises that these are no characters, so hardly any text holds one.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class AddedTokenFinder:
    """Cuts a text at the added tokens in it: the leftmost first, of those the longest."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        lengths: dict[str, set[int]] = {}
        for content in self._tokens:
            lengths.setdefault(content[0], set()).add(len(content))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        letters = "".join(map(re.escape, self._lengths))
        self._start = re.compile(f"[{letters}]") if letters else None

    def split(self, text: str) -> Iterator[tuple[int, str | AddedToken]]:
        """Yield each token found and each stretch of text between, with where it starts."""
        done, place = 0, 0
        while self._start and (start := self._start.search(text, place)):
            place = start.start()
            token = self._token_at(text, place)
            if token is None:
                place += 1
                continue
            left, right = place, place + len(token.content)
            while token.lstrip and left > done and text[left - 1].isspace():
                left -= 1
            while token.rstrip and right < len(text) and text[right].isspace():
                right += 1
            if left > done:
                yield done, text[done:left]
            yield left, token
            done = place = right
        if done < len(text):
            yield done, text[done:]

    def _token_at(self, text: str, place: int) -> AddedToken | None:
        for length in self._lengths[text[place]]:
            token = self._tokens.get(text[place : place + length])
            if token is not None and not (token.single_word and _in_word(text, place, length)):
                return token
        return None

    def disarmed(self, text: str, mark: str, allowed: frozenset[str]) -> str:
        """Return `text` with `mark` in every place where it could make one of these tokens.

        The mark goes behind the first character of a token, wherever that occurs: a token that is
        only begun might be finished by the next text, or by a template that takes a part out of
        this one. A complete <tag> that is no token stays as it is, since templates look for such.

        Args:
            text: what nobody vouches for.
            mark: a character that `text` does not hold.
            allowed: tokens that this text may make.
        """
        if self._start is None:
            return text
        parts, done = [], 0
        for start in self._start.finditer(text):
            token = self._token_at(text, start.start())
            if token is None:
                harmless = TAG.match(text, start.start()) is not None
            else:
                harmless = token.content in allowed
            if not harmless:
                parts += [text[done : start.end()], mark]
                done = start.end()
        return "".join([*parts, text[done:]])


def _in_word(text: str, place: int, length: int) -> bool:
    around = text[max(place - 1, 0) : place] + text[place + length : place + length + 1]
    return any(character.isalnum() or character == "_" for character in around)


def unused_mark(values: Any) -> str:
    """Return a character that no text within `values` holds.

    Raises:
        InputError: the texts hold all 32 of Unicode's set-aside non-characters.
    """
    left = set(NONCHARACTERS)
    for text in texts_within(values):
        left -= {mark for mark in left if mark in text}
    if not left:
        raise InputError("the messages hold all of Unicode's non-characters U+FDD0..U+FDEF")
    return min(left)


def texts_within(value: Any) -> Iterator[str]:
    """Yield every text in plain data: contents, keys, list elements."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield str(key)
            yield from texts_within(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_within(one)
