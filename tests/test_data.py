"""Documents become token streams: nothing is lost, and a stream goes on exactly where it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.data import (
    IGNORED,
    PackedBatch,
    PackedStream,
    Position,
    TokenizedDocuments,
    validation_batches,
)
from jamba_lm.errors import DataError

BOS, EOS = 1, 2


class Letters:
    """A tokenizer of one id a character."""

    bos_id = BOS
    eos_ids = (EOS,)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        assert add_bos is False
        return [ord(letter) for letter in text]


def documents_of(lengths: list[int]) -> TokenizedDocuments:
    """Documents in which no two tokens are alike, so that each can be looked for."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    ids = np.arange(100, 100 + starts[-1], dtype=np.int32)
    return TokenizedDocuments(ids, starts, np.array(lengths, dtype=np.int64), BOS)


def pieces_of(batch: PackedBatch) -> list[list[int]]:
    return [piece.tolist() for piece in batch.ids_M.split(batch.lengths)]


many_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(many_lengths, st.integers(2, 20), st.integers(1, 4), st.integers(1, 4))
def test_several_readers_read_what_one_would(lengths, sequence_tokens, readers, more_readers):
    """And others, another number of them, go on where they stopped."""
    documents = documents_of(lengths)

    def stream(reader: int, readers: int, position: Position | None = None) -> PackedStream:
        return PackedStream(
            documents, sequence_tokens=sequence_tokens, batch_tokens=sequence_tokens + 3, seed=0,
            position=position, reader=reader, readers=readers,
        )  # fmt: skip

    alone = stream(0, 1)
    expected = [pieces_of(alone.next()) for _ in range(2 * readers + 2 * more_readers)]
    found, position = [], None
    for count in (readers, more_readers):
        streams = [stream(reader, count, position) for reader in range(count)]
        found += [pieces_of(one.next()) for _ in range(2) for one in streams]
        position = streams[0].position
        assert all(one.position == position for one in streams)
    assert found == expected
    assert position == alone.position


@given(many_lengths, st.integers(2, 20), st.integers(0, 30), st.integers(0, 5))
def test_an_epoch_holds_every_token_once(lengths, sequence_tokens, more, seed):
    documents = documents_of(lengths)
    stream = PackedStream(
        documents,
        sequence_tokens=sequence_tokens,
        batch_tokens=sequence_tokens + more,
        seed=seed,
    )
    seen: list[int] = []
    while len(seen) < documents.num_tokens:
        for piece in pieces_of(stream.next()):
            seen += piece[1:]
    epoch = sorted(seen[: documents.num_tokens])
    assert epoch == documents.ids.tolist()


@given(many_lengths, st.integers(2, 20), st.integers(0, 30))
def test_a_piece_is_text_in_order_behind_a_beginning_token(lengths, sequence_tokens, more):
    stream = PackedStream(
        documents_of(lengths),
        sequence_tokens=sequence_tokens,
        batch_tokens=sequence_tokens + more,
        seed=3,
    )
    for _ in range(8):
        batch = stream.next()
        assert len(batch.ids_M) == sequence_tokens + more == sum(batch.lengths)
        targets = batch.targets_M.split(batch.lengths)
        for piece, target in zip(pieces_of(batch), targets, strict=True):
            assert piece[0] == BOS
            assert len(piece) <= sequence_tokens
            assert piece[1:] == list(range(piece[1], piece[1] + len(piece) - 1)) if piece[1:] else 1
            assert target.tolist() == [*piece[1:], IGNORED]
        assert batch.num_targets == int((batch.targets_M != IGNORED).sum())


@given(many_lengths, st.integers(2, 20), st.integers(0, 30), st.integers(0, 12))
def test_a_stream_goes_on_at_its_position(lengths, sequence_tokens, more, first):
    def open_stream(position=None):
        return PackedStream(
            documents_of(lengths),
            sequence_tokens=sequence_tokens,
            batch_tokens=sequence_tokens + more,
            seed=1,
            position=position,
        )

    whole = open_stream()
    for _ in range(first):
        whole.next()
    resumed = open_stream(whole.position)
    for _ in range(6):
        assert resumed.next().ids_M.tolist() == whole.next().ids_M.tolist()


def test_epochs_differ_in_order_and_in_cuts():
    stream = PackedStream(documents_of([200]), sequence_tokens=11, batch_tokens=110, seed=0)
    epochs: dict[int, list[list[int]]] = {}
    while stream.position.epoch < 3:
        epoch = stream.position.epoch
        epochs.setdefault(epoch, []).extend(pieces_of(stream.next()))
    cuts = [frozenset(min(piece[1:]) % 10 for piece in epochs[e] if piece[1:]) for e in range(3)]
    assert epochs[0] != epochs[1]
    assert len(set(cuts)) > 1


@given(many_lengths, st.integers(2, 20), st.integers(1, 60))
def test_validation_predicts_every_token_exactly_once(lengths, sequence_tokens, batch_tokens):
    documents = documents_of(lengths)
    batches = list(
        validation_batches(documents, sequence_tokens=sequence_tokens, batch_tokens=batch_tokens)
    )
    predicted = [t for b in batches for t in b.targets_M.tolist() if t != IGNORED]
    assert predicted == documents.ids.tolist()
    assert all(piece[0] == BOS for b in batches for piece in pieces_of(b))


def test_documents_are_kept_apart_and_counted_in_bytes(tmp_path):
    path = tmp_path / "two.jsonl"
    texts = ["ab", "é\n"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    documents = TokenizedDocuments.read([path], Letters(), "training")
    assert documents.ids.tolist() == [ord("a"), ord("b"), EOS, ord("é"), ord("\n"), EOS]
    assert documents.starts.tolist() == [0, 3, 6]
    assert documents.num_bytes.tolist() == [2, 3]
    assert len(documents) == 2


@pytest.mark.parametrize("change", ["ids", "starts", "bos"])
def test_the_fingerprint_tells_other_data(change):
    before = documents_of([3, 4])
    ids, starts, bos = before.ids.copy(), before.starts.copy(), BOS
    if change == "ids":
        ids[0] += 1
    elif change == "starts":
        starts[1] += 1
    else:
        bos += 1
    after = TokenizedDocuments(ids, starts, before.num_bytes, bos)
    assert after.fingerprint() != before.fingerprint()
    assert documents_of([3, 4]).fingerprint() == before.fingerprint()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no training document"):
        TokenizedDocuments.read([tmp_path / "empty.jsonl"], Letters(), "training")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = Letters()
    tokenizer.eos_ids = ()
    with pytest.raises(DataError, match="no beginning-of-sequence or no end token"):
        TokenizedDocuments.read([tmp_path / "any.jsonl"], tokenizer, "training")
