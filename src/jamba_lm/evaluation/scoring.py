"""How well a model predicts a text: loss per token and bits per byte, in pieces.

Knows models and tokenizers; keeps neither the text, nor its tokens, nor logits for longer than a
piece, so that the length of the text costs time and not memory.

T tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from jamba_lm.errors import DataError, InputError
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.call_arguments import require_ids
from jamba_lm.text.tokenizer import Tokenizer

# Tokens read at once: their logits are 64 MiB for the published vocabulary.
PIECE_TOKENS = 256
BLOCK_BYTES = 1024**2
# Where a text may be cut without changing its tokens: where a line begins that is not white space.
# Tokenizers of this family let no token reach over that place.
LINE_START = re.compile(r"\n(?=\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a text was predicted.

    Attributes:
        num_bytes: length of the text in UTF-8.
        num_tokens: tokens predicted.
        nats: sum of -ln p over these tokens.
        num_windows: how many times the model started afresh.
    """

    num_bytes: int
    num_tokens: int
    nats: float
    num_windows: int

    @property
    def loss(self) -> float:
        """Mean of -ln p per token, in nats."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite when a float cannot hold it."""
        return math.exp(self.loss) if self.loss < math.log(1.7e308) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The length of the text as an arithmetic coder would write it with this model.

        Unlike the loss it can be compared between tokenizers, and with file compressors.
        """
        return self.nats / math.log(2) / self.num_bytes


def score_file(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    piece_tokens: int = PIECE_TOKENS,
    context_tokens: int | None = None,
    on_progress: Callable[[Score], None] | None = None,
) -> Score:
    """Score a text file as one document.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        path: a UTF-8 file, of any length.
        piece_tokens: tokens whose logits exist at once.
        context_tokens: start afresh after this many tokens, which bounds what attention layers
            remember; that of the model's config when None.
        on_progress: called after every piece, with the score so far.

    Raises:
        DataError: the file is missing, empty or not UTF-8; nothing was computed then.
    """
    count_text_bytes(path)
    blocks = ((tokenizer.encode(text, add_bos=False), size) for text, size in read_blocks(path))
    return score_blocks(
        model,
        blocks,
        bos_id=tokenizer.bos_id,
        piece_tokens=piece_tokens,
        context_tokens=context_tokens,
        on_progress=on_progress,
    )


def score_blocks(
    model: LanguageModel,
    blocks: Iterable[tuple[list[int], int]],
    *,
    bos_id: int | None,
    piece_tokens: int = PIECE_TOKENS,
    context_tokens: int | None = None,
    on_progress: Callable[[Score], None] | None = None,
) -> Score:
    """Score one document whose tokens arrive in blocks, each with the bytes it stands for.

    A window begins with BOS, so that every token of the text is predicted. Without a BOS the first
    token of a window has nothing to be predicted from: it costs ln V, what a blind guess costs.

    Raises:
        DataError: there are no tokens.
        InputError: an id is out of range, or a length is not positive.
    """
    context_tokens = model.config.context_length if context_tokens is None else context_tokens
    for name, value in (("piece_tokens", piece_tokens), ("context_tokens", context_tokens)):
        if value < 1:
            raise InputError(f"{name} is {value}: expected at least 1")
    vocab_size = model.config.vocab_size
    nats, num_tokens, num_bytes, num_windows = 0.0, 0, 0, 0
    state, before, in_window = model.new_state(), bos_id, 0
    for ids, size in blocks:
        ids = require_ids(ids, vocab_size)
        num_bytes += size
        start = 0
        while start < len(ids):
            if in_window == context_tokens:
                state, before, in_window = model.new_state(), bos_id, 0
            num_windows += in_window == 0
            end = min(start + piece_tokens, start + context_tokens - in_window, len(ids))
            targets = ids[start:end]
            if before is None:
                nats += math.log(vocab_size)
                inputs, predicted = targets[:-1], targets[1:]
            else:
                inputs, predicted = [before, *targets[:-1]], targets
            if inputs:
                nats += surprise(model.logits([inputs], [state])[0], predicted)
            num_tokens += len(targets)
            in_window += len(targets)
            before = targets[-1]
            start = end
            if on_progress is not None:
                on_progress(
                    Score(
                        # Bytes of a block that is half read are counted by its tokens.
                        num_bytes=num_bytes - size + size * end // len(ids),
                        num_tokens=num_tokens,
                        nats=nats,
                        num_windows=num_windows,
                    )
                )
    if not num_tokens:
        raise DataError("there is no text to score: expected at least one token")
    return Score(num_bytes=num_bytes, num_tokens=num_tokens, nats=nats, num_windows=num_windows)


def surprise(logits_TV: Tensor, targets: list[int]) -> float:
    """Return the sum of -ln p of the targets, added up in float64."""
    nats_T = F.cross_entropy(
        logits_TV, torch.tensor(targets, device=logits_TV.device), reduction="none"
    )
    return float(nats_T.sum(dtype=torch.float64))


def count_text_bytes(path: Path) -> int:
    """Return the length of a text file, after making sure that it is text.

    Raises:
        DataError: the file is missing, empty or not UTF-8; the message names the first bad byte.
    """
    num_bytes = 0
    for _, size in read_blocks(path):
        num_bytes += size
    if not num_bytes:
        raise DataError(f"{str(path)!r} is empty: expected a UTF-8 text file")
    return num_bytes


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[str, int]]:
    """Yield a text file in blocks of about `block_bytes`, each with its own length in bytes.

    Blocks are cut where a line begins, so that they have the tokens that the whole text has; a
    longer line is cut where it must be.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"no text at {str(path)!r}: expected a UTF-8 text file")
    try:
        with path.open("rb") as file:
            yield from _blocks(file, path, block_bytes)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _blocks(file: BinaryIO, path: Path, block_bytes: int) -> Iterator[tuple[str, int]]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    done, text = 0, ""
    while data := file.read(block_bytes):
        text += _decode(decoder, data, done, path)
        done += len(data)
        cuts = [match.end() for match in LINE_START.finditer(text)]
        cut = cuts[-1] if cuts else (len(text) if len(text) >= block_bytes else 0)
        if cut:
            yield text[:cut], len(text[:cut].encode())
            text = text[cut:]
    text += _decode(decoder, b"", done, path)
    if text:
        yield text, len(text.encode())


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, done: int, path: Path) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        place = done - pending + error.start
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte {place:,} is 0x{error.object[error.start]:02x} "
            f"({error.reason}); convert it, for example with iconv"
        ) from error
