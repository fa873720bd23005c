"""Training batches out of a prepared corpus: sources by weight, packed, resumable to the token.

There is one sequence of batches, whoever reads it: a rank, or a worker of one, takes every n-th and
skips the others without reading them. So a run may go on with any number of ranks and workers.

M rows (tokens of a batch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jamba_lm.corpus.packing import PackedSource, SourcePosition, Span
from jamba_lm.corpus.prepared import PreparedCorpus
from jamba_lm.data import PackedBatch, TokenizedDocuments, pack
from jamba_lm.errors import DataError, RecipeError


@dataclass(frozen=True, slots=True)
class MixedPosition:
    """How far a `MixedStream` has been read: enough to go on exactly there.

    Attributes:
        batches: how many, of all ranks and workers together.
        turns: how many sequences each source has given.
        sources: how far each has been read.
    """

    batches: int = 0
    turns: tuple[int, ...] = ()
    sources: tuple[SourcePosition, ...] = ()

    @property
    def epoch(self) -> int:
        """How often the source that is read most often has been read whole."""
        return max((source.epoch for source in self.sources), default=0)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MixedPosition:
        """Read what `dataclasses.asdict` and JSON have made of a position.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        return cls(
            int(value["batches"]),
            tuple(int(turns) for turns in value["turns"]),
            tuple(SourcePosition(**source) for source in value["sources"]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class MixedBatch:
    """A batch, and where its pieces come from.

    Attributes:
        packed: ids, targets and lengths.
        spans: for each piece the part of a document that it is, and whether that was cut.
    """

    packed: PackedBatch
    spans: list[Span]

    @property
    def num_cuts(self) -> int:
        """Pieces that end before their document does."""
        return sum(span.cut_after for span in self.spans)


class MixedStream:
    """Training batches without end.

    A batch of `batch_tokens` is as many turns of `sequence_tokens`, the last one perhaps shorter.
    Each turn goes to the source that is furthest behind its weight; the turns that a source has in
    one batch are one run of its packed documents. So a source's part of all batches so far is its
    share, to within a turn or two.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        *,
        sequence_tokens: int,
        batch_tokens: int,
        seed: int,
        position: MixedPosition | None = None,
        weights: Mapping[str, float] | None = None,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        """Start reading at `position`.

        Args:
            corpus: what to read.
            sequence_tokens: tokens of the longest piece, with its beginning token; at least 2.
            batch_tokens: tokens of every batch; at least `sequence_tokens`.
            seed: of the cuts and the order.
            position: where to go on; None starts from the beginning.
            weights: of sources, by name, in place of the corpus' own.
            reader: which of the readers this is: rank * workers + worker, say.
            readers: how many share the batches.

        Raises:
            DataError: a source with a weight has no documents, or the position is of another
                corpus.
            RecipeError: a weight is of no source, or impossible.
        """
        assert 2 <= sequence_tokens <= batch_tokens
        assert 0 <= reader < readers
        self._weights = _weights(corpus, weights or {})
        self._bos_id = corpus.bos_id
        self._turn_tokens = _turns(sequence_tokens, batch_tokens)
        self._reader, self._readers = reader, readers
        count = len(corpus.sources)
        at = position or MixedPosition()
        if at.sources and len(at.sources) != count:
            raise DataError(
                f"the position to resume at is of a corpus with {len(at.sources)} sources, this "
                f"one has {count}: bring the old corpus back, or start anew"
            )
        self._batches = at.batches
        self._turns = list(at.turns or [0] * count)
        self._sources = {
            number: PackedSource(
                corpus,
                number,
                sequence_tokens=sequence_tokens,
                seed=seed,
                position=at.sources[number] if at.sources else SourcePosition(),
            )
            for number, weight in enumerate(self._weights)
            if weight
        }
        self._untouched = at.sources or (SourcePosition(),) * count

    @property
    def position(self) -> MixedPosition:
        """Where to go on: before the next batch of the first reader."""
        return MixedPosition(
            self._batches,
            tuple(self._turns),
            tuple(
                self._sources[number].position if number in self._sources else untouched
                for number, untouched in enumerate(self._untouched)
            ),
        )

    def next(self) -> PackedBatch:
        """Return this reader's next batch and move past those of all readers."""
        return self.next_mixed().packed

    def next_mixed(self) -> MixedBatch:
        """Return the same with the origin of every piece."""
        self._skip(self._reader)
        batch = self._take()
        self._skip(self._readers - self._reader - 1)
        return batch

    def _skip(self, batches: int) -> None:
        for _ in range(batches):
            for number, room in self._shares().items():
                self._sources[number].skip(room)

    def _take(self) -> MixedBatch:
        taken = [
            one
            for number, room in self._shares().items()
            for one in self._sources[number].take(room)
        ]
        pieces = [tokens.astype(np.int32) for _, tokens in taken]
        return MixedBatch(pack(pieces, self._bos_id), [span for span, _ in taken])

    def _shares(self) -> dict[int, int]:
        """Give the turns of the next batch to the sources: rows of each, in their order."""
        rooms: dict[int, int] = {}
        total = sum(self._turns)
        for tokens in self._turn_tokens:
            # Who is furthest behind its share of the turns; the first of equals.
            total += 1
            number = max(
                self._sources, key=lambda one: (self._weights[one] * total - self._turns[one], -one)
            )
            self._turns[number] += 1
            rooms[number] = rooms.get(number, 0) + tokens
        self._batches += 1
        return dict(sorted(rooms.items()))


def _turns(sequence_tokens: int, batch_tokens: int) -> list[int]:
    whole, rest = divmod(batch_tokens, sequence_tokens)
    # A row alone holds nothing but a beginning token, so the last turn takes it along.
    turns = [sequence_tokens] * whole
    if rest == 1:
        turns[-1] += 1
    elif rest:
        turns.append(rest)
    return turns


def _weights(corpus: PreparedCorpus, given: Mapping[str, float]) -> list[float]:
    names = [source.name for source in corpus.sources]
    for name, weight in given.items():
        if name not in names:
            raise RecipeError(f"a weight is for {name!r}, but the sources are {', '.join(names)}")
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"the weight of {name!r} is {weight}: expected a number from 0 on")
    weights = [given.get(source.name, source.weight) for source in corpus.sources]
    if not any(weights):
        raise RecipeError("every source has the weight 0: there is nothing to train on")
    for source, weight in zip(corpus.sources, weights, strict=True):
        if weight and not source.num_tokens:
            raise DataError(
                f"source {source.name!r} has a weight of {weight:g} and no document left to train "
                "on: give it the weight 0, or look into the report for what dropped them"
            )
    total = sum(weights)
    return [weight / total for weight in weights]


def held_out_documents(corpus: PreparedCorpus, sources: Sequence[str] = ()) -> TokenizedDocuments:
    """Return the held-out documents, of all sources or of some, in memory.

    Raises:
        DataError: there are none.
    """
    shards = [
        corpus.open(entry)
        for source in corpus.sources
        if not sources or source.name in sources
        for entry in source.validation
    ]
    if not shards:
        raise DataError(
            f"the corpus in {str(corpus.folder)!r} holds no document out: prepare it with a "
            "split.validation above 0"
        )
    ids = np.concatenate([np.asarray(shard.ids, dtype=np.int32) for shard in shards])
    lengths = np.concatenate([np.diff(shard.starts) for shard in shards])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_bytes = np.concatenate([shard.num_bytes for shard in shards]).astype(np.int64)
    return TokenizedDocuments(ids, starts, num_bytes, corpus.bos_id)
