"""Documents of text files, and pieces drawn from all over them.

A file holds a document a line (.jsonl) or is one document. It does not know what the text is for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from jamba_lm.errors import DataError

MAXIMUM_LINE_BYTES = 256 * 2**20

# Of a text that a model is to be rounded for. Of the embedded model four times as many tokens
# lower the divergence by another 3 %.
SAMPLE_TOKENS = 16_384
PIECE_TOKENS = 512


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The token that every sequence starts with."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """The tokens that end a text; the first one is written after each document."""

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Return the ids of `text`."""


def read_documents(path: Path) -> Iterator[str]:
    r"""Yield the documents of a file: one JSON object with a `text` a line, or one plain text.

    A file that ends in `.jsonl` is the first kind, any other the second.

    Raises:
        DataError: the file is missing or not UTF-8, or a line is not an object with a text.
    """
    if not path.is_file():
        raise DataError(f"no text at {str(path)!r}: expected a .jsonl or a plain text file")
    try:
        with path.open("rb") as file:
            if path.suffix != ".jsonl":
                yield file.read().decode("utf-8")
                return
            number = 0
            while line := file.readline(MAXIMUM_LINE_BYTES):
                number += 1
                if line.strip():
                    yield _text_of(line, f"line {number} of {str(path)!r}")
    except UnicodeDecodeError as cause:
        raise DataError(f"{str(path)!r} is not UTF-8 at byte {cause.start}") from cause
    except OSError as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause


def sample_sequences(
    path: Path,
    tokenizer: Encoder,
    tokens: int = SAMPLE_TOKENS,
    *,
    length: int = PIECE_TOKENS,
) -> list[list[int]]:
    """Return pieces from all over a file, the same ones every time.

    Every document is cut into pieces, of which some are drawn, so that neither one source that
    comes first nor one long document is all that there is.

    Args:
        path: as `read_documents` takes it.
        tokenizer: gives ids.
        tokens: at most so many in all; fewer when the file holds fewer.
        length: most tokens of a piece.

    Raises:
        DataError: as `read_documents`, or there is no text in the file.
    """
    # Long enough for most tokenizers, and enough of them for documents of a few words.
    characters, most = 8 * length, max(1, tokens // 32)
    draw, drawn, number = random.Random(0), list[str](), 0
    for text in read_documents(path):
        for first in range(0, len(text), characters):
            piece = text[first : first + characters]
            number += 1
            # Every piece is as likely to be among those drawn as any other (reservoir sampling).
            if len(drawn) < most:
                drawn.append(piece)
            elif (place := draw.randrange(number)) < most:
                drawn[place] = piece
    if not drawn:
        raise DataError(f"{str(path)!r} holds no text")
    draw.shuffle(drawn)
    sequences, left = list[list[int]](), tokens
    for piece in drawn:
        if left <= 0:
            break
        sequences.append(tokenizer.encode(piece, add_bos=True)[: min(length, left)])
        left -= len(sequences[-1])
    return sequences


def _text_of(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
    except (UnicodeDecodeError, RecursionError, ValueError) as cause:
        raise DataError(f"{where} is not JSON: expected an object with a 'text'") from cause
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        raise DataError(f"{where} has no text: expected an object with a non-empty 'text'")
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise DataError(f"{where} holds a lone surrogate at character {cause.start}") from cause
    return text
