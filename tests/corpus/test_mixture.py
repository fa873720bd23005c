"""Batches out of a prepared corpus: nothing lost, shares kept, and gone on with to the token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.corpus.mixture import MixedPosition, MixedStream, held_out_documents
from jamba_lm.corpus.packing import cut
from jamba_lm.corpus.training_text import TrainingText
from jamba_lm.data import IGNORED
from jamba_lm.errors import DataError, RecipeError
from tests.corpus.corpora import BOS, prepared, sentence_text, token_corpus, write_jsonl

shards = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3)
few = settings(max_examples=30)
sizes = st.tuples(st.integers(2, 20), st.integers(0, 30))


@few
@given(shards, sizes, st.integers(0, 5))
def test_an_epoch_of_a_source_holds_every_token_once(lengths, size, seed):
    sequence, more = size
    with TemporaryDirectory() as folder:
        corpus = token_corpus(Path(folder) / "c", {"a": lengths})
        total = sum(map(sum, lengths))
        stream = MixedStream(
            corpus, sequence_tokens=sequence, batch_tokens=sequence + more, seed=seed
        )
        seen: list[int] = []
        while len(seen) < 2 * total:
            batch = stream.next_mixed()
            pieces = [piece.tolist() for piece in batch.packed.ids_M.split(batch.packed.lengths)]
            seen += [token for piece in pieces for token in piece[1:]]
        every = list(range(100, 100 + total))
        assert sorted(seen[:total]) == every
        assert sorted(seen[total : 2 * total]) == every


@few
@given(shards, sizes, st.integers(0, 5))
def test_a_piece_is_text_in_order_and_says_where_it_was_cut(lengths, size, seed):
    sequence, more = size
    with TemporaryDirectory() as folder:
        corpus = token_corpus(Path(folder) / "c", {"a": lengths})
        stream = MixedStream(
            corpus, sequence_tokens=sequence, batch_tokens=sequence + more, seed=seed
        )
        starts = {
            entry.file: np.asarray(corpus.open(entry).starts) for entry in corpus.sources[0].train
        }
        ids = {entry.file: corpus.open(entry).ids for entry in corpus.sources[0].train}
        for _ in range(6):
            batch = stream.next_mixed()
            packed = batch.packed
            assert len(packed.ids_M) == sequence + more == sum(packed.lengths)
            pieces = packed.ids_M.split(packed.lengths)
            targets = packed.targets_M.split(packed.lengths)
            for piece, target, span in zip(pieces, targets, batch.spans, strict=True):
                first, last = starts[span.file][span.document : span.document + 2].tolist()
                assert 1 <= len(piece) <= sequence
                assert piece[0] == BOS
                text = ids[span.file][first + span.first : first + span.last].tolist()
                assert piece[1:].tolist() == text
                assert target.tolist() == [*text, IGNORED]
                assert span.document_tokens == last - first
                assert span.cut_before == (span.first > 0)
                assert span.cut_after == (span.last < last - first)


@few
@given(
    shards,
    shards,
    sizes,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_a_run_goes_on_to_the_token_with_any_number_of_readers(
    one, other, size, before, steps, after, seed
):
    """Read with some ranks, stop, go on with others: the batches are those of a single reader."""
    sequence, more = size
    options = {"sequence_tokens": sequence, "batch_tokens": sequence + more, "seed": seed}
    with TemporaryDirectory() as folder:
        corpus = token_corpus(Path(folder) / "c", {"a": one, "b": other}, {"a": 2.5})
        single = MixedStream(corpus, **options)
        count = before * steps + after * 2
        expected = [single.next().ids_M.tolist() for _ in range(count)]

        streams = [
            MixedStream(corpus, **options, reader=rank, readers=before) for rank in range(before)
        ]
        got = [stream.next().ids_M.tolist() for _ in range(steps) for stream in streams]
        positions = {json.dumps(asdict(stream.position)) for stream in streams}
        assert len(positions) == 1
        position = MixedPosition.from_json(json.loads(positions.pop()))
        assert position.batches == before * steps
        streams = [
            MixedStream(corpus, **options, position=position, reader=rank, readers=after)
            for rank in range(after)
        ]
        got += [stream.next().ids_M.tolist() for _ in range(2) for stream in streams]
        assert got == expected


@few
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(1, 40))
def test_the_share_of_a_source_is_never_off_by_more_than_two_turns(weights, batches):
    with TemporaryDirectory() as folder:
        names = [f"s{number}" for number in range(len(weights))]
        corpus = token_corpus(
            Path(folder) / "c",
            {name: [[50, 7, 90]] for name in names},
            dict(zip(names, weights, strict=True)),
        )
        stream = MixedStream(corpus, sequence_tokens=8, batch_tokens=16, seed=0)
        counts = np.zeros(len(weights))
        for _ in range(batches):
            batch = stream.next_mixed()
            for span, length in zip(batch.spans, batch.packed.lengths, strict=True):
                counts[span.source] += length
        shares = np.array(weights) / sum(weights)
        assert np.abs(counts - shares * 16 * batches).max() <= 16


def test_every_epoch_cuts_and_shuffles_anew(tmp_path):
    corpus = token_corpus(tmp_path / "c", {"a": [[200, 200, 200], [200, 200]]})
    stream = MixedStream(corpus, sequence_tokens=50, batch_tokens=1000, seed=3)
    epochs: dict[int, set[tuple[str, int, int]]] = {}
    while stream.position.epoch < 3:
        for span in stream.next_mixed().spans:
            epochs.setdefault(stream.position.epoch, set()).add(
                (span.file, span.document, span.first)
            )
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 2


def test_another_seed_gives_another_order_and_the_same_seed_the_same(tmp_path):
    corpus = token_corpus(tmp_path / "c", {"a": [[9] * 40]})
    first, again, other = (
        MixedStream(corpus, sequence_tokens=16, batch_tokens=64, seed=seed).next().ids_M.tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_skipping_reads_no_tokens(tmp_path):
    """A rank must not pay for the batches of the others: ids are cut off the file, yet it skips."""
    corpus = token_corpus(tmp_path / "c", {"a": [[30] * 200]})
    options = {"sequence_tokens": 16, "batch_tokens": 64, "seed": 0}
    far = MixedStream(corpus, **options)
    for _ in range(50):
        far.next()
    reads: list[int] = []

    class Counted(np.ndarray):
        def __getitem__(self, key):
            reads.append(1)
            return super().__getitem__(key)

    near = MixedStream(corpus, **options, reader=50, readers=51)
    pieces = near._sources[0]._pieces
    pieces.ids = np.asarray(pieces.ids).view(Counted)
    assert near.next().ids_M.tolist() == far.next().ids_M.tolist()
    assert 0 < len(reads) < 20


def test_weights_may_be_given_anew_and_a_source_left_out(tmp_path):
    corpus = token_corpus(tmp_path / "c", {"a": [[30] * 9], "b": [[30] * 9]})
    stream = MixedStream(
        corpus, sequence_tokens=8, batch_tokens=32, seed=0, weights={"a": 0.0, "b": 3.0}
    )
    for _ in range(5):
        assert {span.source for span in stream.next_mixed().spans} == {1}
    assert stream.position.sources[0].piece == 0
    MixedStream(corpus, sequence_tokens=8, batch_tokens=32, seed=0, position=stream.position)
    for weights, word in (
        ({"c": 1.0}, "a, b"),
        ({"a": -1.0}, "-1"),
        ({"a": float("nan")}, "nan"),
        ({"a": 0, "b": 0}, "weight 0"),
    ):
        with pytest.raises(RecipeError, match=word):
            MixedStream(corpus, sequence_tokens=8, batch_tokens=32, seed=0, weights=weights)


def test_a_source_without_documents_is_refused_by_name(tmp_path):
    corpus = token_corpus(tmp_path / "c", {"a": [[30]], "empty": []})
    with pytest.raises(DataError, match=r"'empty'.*weight 0"):
        MixedStream(corpus, sequence_tokens=8, batch_tokens=32, seed=0)


def test_a_position_of_another_corpus_is_refused(tmp_path):
    one = token_corpus(tmp_path / "one", {"a": [[30]]})
    two = token_corpus(tmp_path / "two", {"a": [[30]], "b": [[30]]})
    at = MixedStream(one, sequence_tokens=8, batch_tokens=32, seed=0).position
    with pytest.raises(DataError, match="1 sources"):
        MixedStream(two, sequence_tokens=8, batch_tokens=32, seed=0, position=at)


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 30), st.integers(0, 9)
)
def test_cutting_covers_every_document_in_order(lengths, piece_tokens, seed):
    starts = np.cumsum([0, *lengths])
    begins, sizes_, documents = cut(starts, piece_tokens, np.random.default_rng(seed))
    assert sizes_.min() >= 1
    assert sizes_.max() <= piece_tokens
    assert begins.tolist() == np.cumsum([0, *sizes_])[:-1].tolist()
    assert sizes_.sum() == starts[-1]
    assert (starts[documents] <= begins).all()
    assert (begins + sizes_ <= starts[documents + 1]).all()


def test_held_out_documents_are_those_of_the_other_side(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", map(sentence_text, range(40)))
    corpus = prepared(
        tmp_path, source=[{"name": "a", "files": ["a.jsonl"]}], split={"validation": 0.3}
    )
    held_out = held_out_documents(corpus)
    assert len(held_out) == corpus.sources[0].validation[0].documents
    assert held_out.bos_id == corpus.bos_id
    assert held_out.num_tokens == corpus.sources[0].validation[0].tokens
    assert int(held_out.num_bytes.sum()) == corpus.sources[0].validation[0].text_bytes
    with pytest.raises(DataError, match=r"split\.validation"):
        held_out_documents(corpus, ["b"])


def test_a_run_is_told_what_it_reads_and_refuses_another_text(tmp_path):
    for number in range(2):
        write_jsonl(
            tmp_path / f"{number}.jsonl", map(sentence_text, range(9 * number, 9 * number + 9))
        )
    one, other = (
        TrainingText(
            prepared(
                tmp_path,
                f"out{number}",
                source=[{"name": "a", "files": [f"{number}.jsonl"], "weight": 2}],
                split={"validation": 0.3},
            ).folder,
            weights={"a": 5},
        )
        for number in range(2)
    )
    record = one.record()
    assert record["training_documents"] + len(one.held_out) == 9
    assert record["weights"] == {"a": 5}
    assert one.fingerprint == TrainingText(one.corpus.folder).fingerprint
    one.check_resumed(record["training_fingerprint"])
    with pytest.raises(DataError, match="not what this run was reading"):
        other.check_resumed(record["training_fingerprint"])
    stream = one.open_stream(sequence_tokens=16, batch_tokens=64, seed=1)
    assert len(stream.next().ids_M) == 64
    assert stream.position.batches == 1
    assert stream.position.epoch == 0
