"""Measures what a tokenizer does to a text: bytes per token, digits on their own, round trip.

Paper: Jamba §3 wants every digit separate and the whole reversible; both are counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jamba_lm.errors import DataError
from jamba_lm.text.tokenizer import Tokenizer

ASCII_DIGITS = frozenset(b"0123456789")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMeasure:
    """What one tokenizer did to some text, BOS left out.

    Attributes:
        num_bytes: length of the text in UTF-8.
        num_characters: its length in code points.
        num_tokens: tokens it became.
        num_digits: how many of 0-9 it holds.
        num_lone_digits: how many of them are a token of their own.
        num_pieces: pieces the text was measured in.
        num_changed: pieces that decoding did not give back exactly.
        distinct_tokens: how many different tokens occurred.
    """

    num_bytes: int
    num_characters: int
    num_tokens: int
    num_digits: int
    num_lone_digits: int
    num_pieces: int
    num_changed: int
    distinct_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, on average."""
        return self.num_bytes / self.num_tokens

    @property
    def digits_split(self) -> float | None:
        """Share of the digits that are a token of their own; None when there are none."""
        return self.num_lone_digits / self.num_digits if self.num_digits else None


def measure_text(tokenizer: Tokenizer, pieces: Iterable[str]) -> TextMeasure:
    """Encode and decode every piece, and count.

    Raises:
        DataError: there is no text at all.
    """
    num_bytes = num_characters = num_tokens = num_digits = num_lone = num_pieces = num_changed = 0
    seen: set[int] = set()
    for text in pieces:
        ids = tokenizer.encode(text, add_bos=False)
        num_pieces += 1
        num_bytes += len(text.encode())
        num_characters += len(text)
        num_tokens += len(ids)
        num_changed += tokenizer.decode(ids) != text
        seen.update(ids)
        for one in ids:
            data = tokenizer.token_bytes(one) or b""
            digits = sum(byte in ASCII_DIGITS for byte in data)
            num_digits += digits
            num_lone += digits == 1 and len(data) == 1
    if not num_tokens:
        raise DataError("there is no text to measure: give a file with some")
    return TextMeasure(
        num_bytes=num_bytes,
        num_characters=num_characters,
        num_tokens=num_tokens,
        num_digits=num_digits,
        num_lone_digits=num_lone,
        num_pieces=num_pieces,
        num_changed=num_changed,
        distinct_tokens=len(seen),
    )
