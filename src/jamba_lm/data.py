"""Documents of text into the token streams that training and validation read.

A document becomes pieces that each start after a beginning-of-sequence token, and pieces are laid
end to end without padding. It does not know models or losses.

M rows (tokens of a batch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jamba_lm.errors import DataError
from jamba_lm.text.documents import Encoder, read_documents

IGNORED = -100
"""The target of a row that predicts nothing; what torch's losses call `ignore_index`."""


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents as ids, end to end, without the tokens that mark where one starts.

    Attributes:
        ids: int32, all documents, each ending with the end-of-text token.
        starts: int64 [documents + 1], where each document starts in `ids`.
        num_bytes: UTF-8 bytes of each document's text, int64 [documents].
        bos_id: the token to put before every piece of a document.
    """

    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    num_bytes: np.ndarray[tuple[int], np.dtype[np.int64]]
    bos_id: int

    @classmethod
    def read(cls, paths: Sequence[Path], tokenizer: Encoder, what: str) -> TokenizedDocuments:
        """Tokenize every document of `paths`.

        Args:
            paths: files that `read_documents` takes.
            tokenizer: has both a beginning and an end token.
            what: what the text is for, for the messages: "training".

        Raises:
            DataError: a file is unusable, there is no document, or the tokenizer has no token
                to mark beginnings or ends with.
        """
        if tokenizer.bos_id is None or not tokenizer.eos_ids:
            raise DataError(
                "the tokenizer names no beginning-of-sequence or no end token; documents are kept "
                "apart by them, so give both in its tokenizer_config.json"
            )
        parts, num_bytes = [], []
        for path in paths:
            for text in read_documents(path):
                ids = tokenizer.encode(text, add_bos=False)
                parts.append(np.array([*ids, tokenizer.eos_ids[0]], dtype=np.int32))
                num_bytes.append(len(text.encode("utf-8")))
        if not parts:
            names = ", ".join(str(path) for path in paths)
            raise DataError(f"no {what} document in {names}: expected at least one")
        starts = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        sizes = np.array(num_bytes, dtype=np.int64)
        return cls(np.concatenate(parts), starts, sizes, tokenizer.bos_id)

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, with the end tokens and without beginnings."""
        return len(self.ids)

    def tensors(self) -> dict[str, Tensor]:
        """Return the three arrays by name, as tensors on the same memory."""
        return {
            "ids": torch.from_numpy(self.ids),
            "starts": torch.from_numpy(self.starts),
            "num_bytes": torch.from_numpy(self.num_bytes),
        }

    def fingerprint(self) -> str:
        """Name the contents, so that a resumed run can tell that it reads the same text."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.starts.tobytes())
        digest.update(str(self.bos_id).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Pieces of documents laid end to end, and what each row is to predict.

    Attributes:
        ids_M: int64 token ids.
        targets_M: int64, the token that follows; `IGNORED` where a piece ends, and where what
            follows is not to be learned.
        lengths: tokens of each piece.
    """

    ids_M: Tensor
    targets_M: Tensor
    lengths: list[int]

    @property
    def num_targets(self) -> int:
        """Rows that predict something."""
        return int((self.targets_M != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Position:
    """How far a `PackedStream` has been read: enough to go on exactly there.

    Attributes:
        epoch: how often all documents have been read.
        piece: of the epoch, in its order.
        token: of the piece: what lies before it was in an earlier batch.
    """

    epoch: int = 0
    piece: int = 0
    token: int = 0


class PackedStream:
    """Training batches without end, shuffled anew each epoch, resumable at any batch.

    In every epoch each document is cut at other places (the first cut is drawn), the pieces of
    all documents are shuffled and laid end to end, and the result is cut into batches of exactly
    `batch_tokens`: matrix products of one size are a good deal faster than those of many sizes.
    Each piece is a sequence of its own to the model: it starts with the beginning token, from an
    empty state, just as a prompt does. Everything follows from the seed and the epoch, so
    `position` is all that has to be remembered.

    There is one sequence of batches, whoever reads it: of several readers each takes every n-th
    and skips the others, so a run may go on with any number of them.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        *,
        sequence_tokens: int,
        batch_tokens: int,
        seed: int,
        position: Position | None = None,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        """Start reading at `position`.

        Args:
            documents: what to read.
            sequence_tokens: tokens of the longest piece, with its beginning token; at least 2.
            batch_tokens: tokens of every batch; at least `sequence_tokens`.
            seed: of the cuts and the order.
            position: where to go on, before the first reader's next batch; None starts from the
                beginning.
            reader: which of the readers this is.
            readers: how many share the batches.
        """
        assert 2 <= sequence_tokens <= batch_tokens
        assert 0 <= reader < readers
        self._documents = documents
        self._reader, self._readers = reader, readers
        self._sequence_tokens = sequence_tokens
        self._batch_tokens = batch_tokens
        self._seed = seed
        self.position = position or Position()
        self._load_epoch()

    def _load_epoch(self) -> None:
        draw = np.random.default_rng([self._seed, self.position.epoch])
        self._pieces = _cut(self._documents.starts, self._sequence_tokens - 1, draw)
        draw.shuffle(self._pieces)

    def next(self) -> PackedBatch:
        """Return this reader's next batch and move past those of all readers."""
        for _ in range(self._reader):
            self._move()
        spans = self._move()
        for _ in range(self._readers - self._reader - 1):
            self._move()
        pieces = [self._documents.ids[start:end] for start, end in spans]
        return pack(pieces, self._documents.bos_id)

    def _move(self) -> list[tuple[int, int]]:
        """Move past a batch and return which tokens it is made of."""
        spans: list[tuple[int, int]] = []
        room, at = self._batch_tokens, self.position
        while room:
            if at.piece == len(self._pieces):
                self.position = at = Position(at.epoch + 1)
                self._load_epoch()
            start, end = self._pieces[at.piece].tolist()
            start += at.token
            taken = min(end - start, room - 1)
            spans.append((start, start + taken))
            room -= 1 + taken
            if start + taken == end:
                at = Position(at.epoch, at.piece + 1)
            else:
                at = Position(at.epoch, at.piece, at.token + taken)
        self.position = at
        return spans


def validation_batches(
    documents: TokenizedDocuments, *, sequence_tokens: int, batch_tokens: int
) -> Iterator[PackedBatch]:
    """Yield every document once, cut into pieces of `sequence_tokens` from its start.

    Each piece starts after a beginning token and every other token is predicted exactly once, so
    the summed loss is the length of a valid code of the whole text (a little longer than it had
    to be, since nothing is remembered from piece to piece).
    """
    chosen: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
    room = batch_tokens
    for start, end in _cut(documents.starts, sequence_tokens - 1, None):
        piece = documents.ids[start:end]
        if chosen and room < 1 + len(piece):
            yield pack(chosen, documents.bos_id)
            chosen, room = [], batch_tokens
        chosen.append(piece)
        room -= 1 + len(piece)
    yield pack(chosen, documents.bos_id)


def pack(pieces: Sequence[np.ndarray[tuple[int], np.dtype[np.int32]]], bos_id: int) -> PackedBatch:
    """Lay pieces end to end, each after a beginning token."""
    lengths = [1 + len(piece) for piece in pieces]
    ids = np.empty(sum(lengths), dtype=np.int64)
    targets = np.empty_like(ids)
    place = 0
    for piece, length in zip(pieces, lengths, strict=True):
        ids[place] = bos_id
        ids[place + 1 : place + length] = piece
        targets[place : place + length - 1] = piece
        targets[place + length - 1] = IGNORED
        place += length
    return PackedBatch(torch.from_numpy(ids), torch.from_numpy(targets), lengths)


def _cut(
    starts: np.ndarray[tuple[int], np.dtype[np.int64]],
    piece_tokens: int,
    draw: np.random.Generator | None,
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Cut documents into pieces of at most `piece_tokens`: rows of (start, past the end).

    With a generator, a document longer than a piece gets a first piece of a length that is drawn,
    so that the cuts fall elsewhere in every epoch.
    """
    pieces: list[tuple[int, int]] = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        first = start
        if draw is not None and end - start > piece_tokens:
            first = start + int(draw.integers(1, piece_tokens + 1))
            pieces.append((start, first))
        pieces += [(a, min(a + piece_tokens, end)) for a in range(first, end, piece_tokens)]
    return np.array(pieces, dtype=np.int64)
