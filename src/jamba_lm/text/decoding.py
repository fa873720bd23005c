"""Turns token ids into text: which bytes each token stands for, and how they become characters.

Everything is bytes until the last moment, so that a text can be given out while it grows. Knows
nothing about the tokenizers library, whose decoders want all ids at once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jamba_lm.errors import InputError, TokenizerError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# An id that the vocabulary lacks: a model's vocabulary may be padded to a round number.
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
STRIP_LIMIT = 64


@cache
def byte_symbols() -> Mapping[str, int]:
    """Return GPT-2's spelling of the 256 bytes as printable characters, symbol -> byte.

    Source: openai/gpt-2 `encoder.py`, `bytes_to_unicode`; the byte-level kind of every library.

    >>> byte_symbols()["Ġ"], byte_symbols()["a"]
    (32, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + place): value for place, value in enumerate(others)
    }


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the names of tokens become a text.

    Attributes:
        byte_level: names are spelled in `byte_symbols`.
        byte_fallback: a name such as <0x0A> is one byte.
        replacements: what is replaced in every other name, in this order.
        dummy: a character that is dropped from the name of the first token.
        strip: a character that is dropped from the front of the text, `strip_count` times at most.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dummy: str = ""
    strip: str = ""
    strip_count: int = 0

    def spell(self, name: str) -> bytes:
        """Return the bytes that the token of this name writes."""
        if self.byte_level:
            symbols = byte_symbols()
            if all(symbol in symbols for symbol in name):
                return bytes(symbols[symbol] for symbol in name)
            return name.encode()
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for old, new in self.replacements:
            name = name.replace(old, new)
        return name.encode()

    def spell_first(self, name: str) -> bytes:
        """Return the bytes that the token of this name writes when it is the first of a text."""
        return self.spell(name.replace(self.dummy, "") if self.dummy else name)


def read_decoding(decoder: Any) -> Decoding:
    """Understand the `decoder` of a tokenizer.json.

    Raises:
        TokenizerError: it is missing, malformed, or its text could not be streamed.
    """
    parts = _parts(decoder)
    kinds = [part["type"] for part in parts]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        return Decoding(byte_level=True)
    values: dict[str, Any] = {"replacements": ()}
    whole = False
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            whole = True
        elif kind == "Strip" and whole:
            values |= _strip(part)
        elif kind == "Replace" and not whole:
            values["replacements"] += (_replacement(part),)
        elif kind == "Metaspace" and not whole:
            values |= _metaspace(part)
            values["replacements"] += ((part["replacement"], " "),)
        elif kind == "ByteFallback" and not whole:
            values["byte_fallback"] = True
        else:
            raise TokenizerError(
                f"decoder {' > '.join(kinds)} is not supported: expected ByteLevel, or Replace or "
                "Metaspace, ByteFallback, Fuse and Strip, in this order"
            )
    return Decoding(**values)


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """List the parts of a decoder, checked to be named objects."""
    if not isinstance(decoder, dict):
        raise TokenizerError(
            f"decoder is {decoder!r:.80}, but without one the text of a token is unknown"
        )
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(parts, list) or not 1 <= len(parts) <= 16:
        raise TokenizerError("decoder.decoders is not a list of 1 to 16 decoders")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise TokenizerError(f"decoder has a part {part!r:.80}, expected an object with a type")
    return parts


def _replacement(part: Mapping[str, Any]) -> tuple[str, str]:
    pattern = part.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    new = part.get("content")
    if not (isinstance(old, str) and old and isinstance(new, str) and len(new) <= len(old)):
        raise TokenizerError(
            f"decoder Replace of {pattern!r:.80} by {new!r:.80} is not supported: expected a "
            "String, and a content that is no longer"
        )
    return old, new


def _metaspace(part: Mapping[str, Any]) -> dict[str, Any]:
    symbol, scheme = part.get("replacement"), part.get("prepend_scheme", "always")
    if not (isinstance(symbol, str) and len(symbol) == 1) or scheme not in (
        "always",
        "first",
        "never",
    ):
        raise TokenizerError(f"decoder Metaspace is malformed: {dict(part)!r:.160}")
    return {"dummy": "" if scheme == "never" else symbol}


def _strip(part: Mapping[str, Any]) -> dict[str, Any]:
    symbol, start, stop = part.get("content"), part.get("start"), part.get("stop")
    if (
        not (isinstance(symbol, str) and len(symbol) == 1)
        or not (isinstance(start, int) and 0 <= start <= STRIP_LIMIT)
        or stop != 0
    ):
        raise TokenizerError(
            f"decoder Strip is {dict(part)!r:.160}, expected one character, a start of at most "
            f"{STRIP_LIMIT} and a stop of 0 (the end of a text is not known while it grows)"
        )
    return {"strip": symbol, "strip_count": int(start)}


class TextStream:
    """A text that grows token by token; what was given out never changes.

    All that `push` returned, and then `flush`, is the text that `Tokenizer.decode` gives for the
    same ids. A character is given out when its last byte is there; bytes that are no character
    become U+FFFD as soon as that is certain. The work per token is that of its own bytes.
    """

    def __init__(
        self,
        decoding: Decoding,
        names: Mapping[int, str],
        bytes_by_id: Mapping[int, bytes],
        skipped: frozenset[int],
    ) -> None:
        """Start an empty text.

        Args:
            decoding: how names become text.
            names: the name of each token.
            bytes_by_id: what each token writes.
            skipped: tokens that write nothing.
        """
        self._decoding = decoding
        self._names = names
        self._bytes_by_id = bytes_by_id
        self._skipped = skipped
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_first_token = bool(self._decoding.dummy)
        self._strip_left = self._decoding.strip_count

    def push(self, token_id: int) -> str:
        """Add a token, and return the text that became certain with it.

        An id that the vocabulary lacks is U+FFFD: models have more rows than tokens at times.

        Raises:
            InputError: the id is negative.
        """
        return self._stripped(self._utf8.decode(self._bytes_of(token_id)))

    def flush(self) -> str:
        """Return what is left, with U+FFFD for half a character, and start a new text."""
        rest = self._stripped(self._utf8.decode(b"", final=True))
        self._restart()
        return rest

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id < 0:
            raise InputError(f"{token_id} is no token id: expected 0 or more")
        if token_id in self._skipped:
            return b""
        if self._at_first_token:
            self._at_first_token = False
            if token_id in self._names:
                return self._decoding.spell_first(self._names[token_id])
        return self._bytes_by_id.get(token_id, UNKNOWN)

    def _stripped(self, text: str) -> str:
        """Take the characters off the front of the text that the file says to take off."""
        while self._strip_left and text:
            if text[0] != self._decoding.strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
