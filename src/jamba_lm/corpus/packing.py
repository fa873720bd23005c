"""One source's documents, cut and laid end to end without padding, from any place on.

Every epoch reads the shards in another order, cuts long documents at other places (the first cut is
drawn) and shuffles the pieces of a shard. Everything follows from the seed and the position, and
skipping costs no reading of tokens. Knows nothing of other sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jamba_lm.corpus.prepared import PreparedCorpus, ShardEntry
from jamba_lm.corpus.shard_file import Shard

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """How far a source has been read.

    Attributes:
        epoch: how often all of it.
        shard: of the epoch, in its order.
        piece: of the shard, in its order.
        token: of the piece: what lies before was in an earlier batch.
    """

    epoch: int = 0
    shard: int = 0
    piece: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a document that is one sequence to the model.

    Attributes:
        source: number of the source.
        file: of the shard.
        document: in the shard.
        first: its first token in the document.
        last: one past its last token in the document.
        document_tokens: of the whole document, with its end token.
    """

    source: int
    file: str
    document: int
    first: int
    last: int
    document_tokens: int

    @property
    def cut_before(self) -> bool:
        """Whether the document goes on from an earlier span."""
        return self.first > 0

    @property
    def cut_after(self) -> bool:
        """Whether the document goes on in a later span."""
        return self.last < self.document_tokens


class PackedSource:
    """Spans of one source, as many tokens at a time as asked for, without end."""

    def __init__(
        self,
        corpus: PreparedCorpus,
        number: int,
        *,
        sequence_tokens: int,
        seed: int,
        position: SourcePosition,
    ) -> None:
        """Go on at `position`.

        Args:
            corpus: the source's.
            number: of the source.
            sequence_tokens: tokens of the longest span, with its beginning token; at least 2.
            seed: of the cuts and the order.
            position: as `position` said.
        """
        self._corpus = corpus
        self._number = number
        self._entries = corpus.sources[number].train
        self._sequence_tokens = sequence_tokens
        self._seed = seed
        self.position = position
        self._order = self._shard_order()
        self._pieces = self._open_pieces()

    def _shard_order(self) -> list[int]:
        draw = np.random.default_rng([self._seed, self._number, self.position.epoch])
        return draw.permutation(len(self._entries)).tolist()

    def _open_pieces(self) -> _Pieces:
        number = self._order[self.position.shard]
        return _Pieces(
            self._corpus.open(self._entries[number]),
            self._entries[number],
            self._sequence_tokens - 1,
            # Another stream than the one that orders the shards, hence a number more.
            np.random.default_rng([self._seed, self._number, self.position.epoch, number]),
        )

    def take(self, num_tokens: int) -> list[tuple[Span, Array]]:
        """Return spans, with their tokens, that fill exactly that many rows, and move past them.

        Every span needs one row more than it has tokens, for the beginning token before it. One
        that would not fit is cut; a row that is left alone holds a span of no tokens.
        """
        taken: list[tuple[Span, Array]] = []
        self._move(num_tokens, lambda move: taken.extend(self._spans(move)))
        return taken

    def skip(self, num_tokens: int) -> None:
        """Move as `take` does, without reading a token."""
        self._move(num_tokens, lambda move: None)

    def _move(self, room: int, visit: Callable[[_Move], None]) -> None:
        while room:
            at = self.position
            if at.piece == len(self._pieces.lengths):
                self._next_shard()
                continue
            move = self._pieces.move(at.piece, at.token, room)
            visit(move)
            self.position = SourcePosition(at.epoch, at.shard, move.piece, move.token)
            room = move.room_left

    def _next_shard(self) -> None:
        at = self.position
        if at.shard + 1 < len(self._order):
            self.position = SourcePosition(at.epoch, at.shard + 1)
        else:
            self.position = SourcePosition(at.epoch + 1)
            self._order = self._shard_order()
        self._pieces = self._open_pieces()

    def _spans(self, move: _Move) -> Iterator[tuple[Span, Array]]:
        pieces = self._pieces
        token = move.first_token
        for piece in range(move.first_piece, move.piece + move.inside):
            start, length = int(pieces.starts[piece]), int(pieces.lengths[piece])
            stop = start + (move.token if piece == move.piece else length)
            document = int(pieces.documents[piece])
            begins, ends = pieces.document_starts[document : document + 2].tolist()
            first = start + token
            yield (
                Span(
                    self._number,
                    pieces.file,
                    document,
                    first - begins,
                    stop - begins,
                    ends - begins,
                ),
                pieces.ids[first:stop],
            )
            token = 0


@dataclass(frozen=True, slots=True)
class _Move:
    """From one place in a shard to another.

    Attributes:
        first_piece: where it begins.
        first_token: of that piece.
        piece: where it ends.
        token: of that piece.
        inside: whether it ends inside of that piece, perhaps right behind its beginning token.
        room_left: rows that the shard had no more pieces for.
    """

    first_piece: int
    first_token: int
    piece: int
    token: int
    inside: bool
    room_left: int


class _Pieces:
    """The documents of one shard in one epoch: cut, shuffled, and how many rows they need.

    Attributes:
        file: of the shard.
        ids: of the shard.
        document_starts: of the shard.
        starts: where each piece starts in `ids`, in the epoch's order.
        lengths: tokens of each piece.
        documents: to which document each belongs.
    """

    def __init__(
        self, shard: Shard, entry: ShardEntry, piece_tokens: int, draw: np.random.Generator
    ) -> None:
        self.file = entry.file
        self.ids = shard.ids
        self.document_starts = np.asarray(shard.starts)
        starts, lengths, documents = cut(self.document_starts, piece_tokens, draw)
        order = draw.permutation(len(starts))
        self.starts, self.lengths = starts[order], lengths[order]
        self.documents = documents[order]
        # Rows of all pieces before each: its tokens and its beginning token.
        self._rows = np.concatenate([[0], np.cumsum(self.lengths + 1)])

    def move(self, piece: int, token: int, room: int) -> _Move:
        """Find where `room` rows from a place end."""
        # A piece that was begun needs a beginning token again, so as many of its rows lie behind
        # as of its tokens; of one that was not begun, none.
        target = int(self._rows[piece]) + token + room
        left = target - int(self._rows[-1])
        if left >= 0:
            return _Move(piece, token, len(self.lengths), 0, inside=False, room_left=left)
        end = int(np.searchsorted(self._rows, target, side="right")) - 1
        rows = target - int(self._rows[end])
        return _Move(piece, token, end, max(0, rows - 1), inside=rows > 0, room_left=0)


def cut(starts: Array, piece_tokens: int, draw: np.random.Generator) -> tuple[Array, Array, Array]:
    """Cut documents into pieces of at most `piece_tokens`.

    A document that is longer gets a first piece of a length that is drawn, so that the cuts fall
    elsewhere in every epoch.

    Returns:
        Where each piece starts, its length, and the number of its document.
    """
    lengths = np.diff(starts)
    long = lengths > piece_tokens
    first = np.where(long, draw.integers(1, piece_tokens + 1, len(lengths)), lengths)
    rest = lengths - first
    counts = 1 + -(-rest // piece_tokens)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.where(number == 0, 0, first[documents] + (number - 1) * piece_tokens)
    ends = np.minimum(first[documents] + number * piece_tokens, lengths[documents])
    return starts[:-1][documents] + begins, ends - begins, documents
