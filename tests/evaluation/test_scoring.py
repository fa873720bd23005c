"""A score is that of the whole text, however it was cut; bytes are counted right."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import DataError, InputError
from jamba_lm.evaluation.scoring import count_text_bytes, read_blocks, score_blocks, score_file
from jamba_lm.language_model import load
from jamba_lm.text.tokenizer import load_tokenizer
from tests.arms import SMALL, random_ids, shaken_model
from tests.tiny_checkpoint import TINY_TEXT
from tests.tolerances import LOSS


@pytest.fixture(scope="module")
def model():
    return shaken_model(SMALL)


def whole_nats(model, ids: list[int], bos_id: int | None = 1) -> float:
    """-ln p of every token, by one softmax over one forward pass."""
    inputs = ids[:-1] if bos_id is None else [bos_id, *ids[:-1]]
    targets = ids[1:] if bos_id is None else ids
    log_p = model.logits([inputs])[0].double().log_softmax(-1)
    blind = math.log(model.config.vocab_size) if bos_id is None else 0.0
    return blind - float(log_p[torch.arange(len(targets)), targets].sum())


@pytest.mark.parametrize("bos_id", [1, None])
@pytest.mark.parametrize("piece_tokens", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 1, 39)])
def test_pieces_and_blocks_change_nothing(model, piece_tokens: int, sizes, bos_id):
    ids = random_ids(SMALL, 60)
    rest = iter(ids)
    blocks = [([next(rest) for _ in range(size)], 2 * size) for size in sizes]
    score = score_blocks(model, blocks, bos_id=bos_id, piece_tokens=piece_tokens)
    assert (score.num_tokens, score.num_bytes, score.num_windows) == (60, 120, 1)
    assert score.nats == pytest.approx(whole_nats(model, ids, bos_id), rel=LOSS)


def test_windows_are_texts_of_their_own(model):
    ids = random_ids(SMALL, 25)
    score = score_blocks(model, [(ids, 25)], bos_id=1, piece_tokens=4, context_tokens=10)
    expected = sum(whole_nats(model, ids[start : start + 10]) for start in (0, 10, 20))
    assert score.num_windows == 3
    assert score.nats == pytest.approx(expected, rel=LOSS)


def test_no_logits_are_made_for_more_than_a_piece(model, monkeypatch):
    rows: list[int] = []
    logits = model.logits

    def counted(sequences, states=None):
        rows.append(sum(len(ids) for ids in sequences))
        return logits(sequences, states)

    monkeypatch.setattr(model, "logits", counted)
    score_blocks(model, [(random_ids(SMALL, 500), 500)], bos_id=1, piece_tokens=16)
    assert max(rows) == 16
    assert sum(rows) == 500


def test_units_follow_from_each_other(model):
    score = score_blocks(model, [(random_ids(SMALL, 30), 90)], bos_id=1)
    assert score.loss == pytest.approx(score.nats / 30)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.nats / 90 / math.log(2))


def test_a_uniform_model_needs_the_bits_that_counting_says(model):
    """Eight bits per byte, were every token a byte and none likelier than another."""
    flat = shaken_model(SMALL)
    with torch.no_grad():
        flat.decoder.head.weight.zero_()
    score = score_blocks(flat, [(random_ids(SMALL, 50), 50)], bos_id=None)
    assert score.bits_per_byte == pytest.approx(math.log2(SMALL.vocab_size), rel=LOSS)


def test_progress_ends_at_the_score(model):
    seen = []
    blocks = [(random_ids(SMALL, 30), 61), (random_ids(SMALL, 5), 10)]
    score = score_blocks(model, blocks, bos_id=1, piece_tokens=7, on_progress=seen.append)
    assert seen[-1] == score
    counts = [one.num_bytes for one in seen]
    assert counts == sorted(counts)
    assert len(seen) == 6


def test_nothing_to_score_is_refused(model):
    with pytest.raises(DataError, match="no text"):
        score_blocks(model, [([], 0)], bos_id=1)
    with pytest.raises(InputError, match="piece_tokens"):
        score_blocks(model, [([1], 1)], bos_id=1, piece_tokens=0)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load(tiny_checkpoint), load_tokenizer(tiny_checkpoint)


def test_a_file_is_scored_as_one_document(tiny, tmp_path):
    model, tokenizer = tiny
    path = tmp_path / "text.txt"
    path.write_bytes(TINY_TEXT.encode())
    score = score_file(model, tokenizer, path, context_tokens=10_000)
    ids = tokenizer.encode(TINY_TEXT, add_bos=False)
    assert score.num_bytes == len(TINY_TEXT.encode())
    assert score.num_tokens == len(ids)
    assert score.nats == pytest.approx(whole_nats(model, ids, tokenizer.bos_id), rel=LOSS)


def test_the_context_of_the_model_bounds_what_is_remembered(tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TINY_TEXT * 3)
    score = score_file(*tiny, path)
    assert score.num_windows == -(-score.num_tokens // tiny[0].config.context_length) > 1


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 100, 10_000])
def test_blocks_have_the_tokens_of_the_whole_text(tiny, tmp_path, block_bytes: int):
    tokenizer = tiny[1]
    text = TINY_TEXT + "\n\n  indented\n\tlines 123\r\nand\nmore\n\n\n" + TINY_TEXT
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    blocks = list(read_blocks(path, block_bytes))
    assert "".join(block for block, _ in blocks) == text
    assert [size for _, size in blocks] == [len(block.encode()) for block, _ in blocks]
    if block_bytes >= 100:
        # No line is longer, so that every cut lies where a line begins.
        ids = [one for block, _ in blocks for one in tokenizer.encode(block, add_bos=False)]
        assert ids == tokenizer.encode(text, add_bos=False)


@given(text=st.text(max_size=60), block_bytes=st.integers(1, 9))
def test_any_text_survives_being_cut(tmp_path_factory, text: str, block_bytes: int):
    path = tmp_path_factory.mktemp("blocks") / "text"
    path.write_bytes(text.encode())
    blocks = list(read_blocks(path, block_bytes))
    assert "".join(block for block, _ in blocks) == text
    assert all(size == len(block.encode()) > 0 for block, size in blocks)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"fine\nuntil \xff here", "byte 11 is 0xff"),
        ("Mädchen".encode("latin-1"), "byte 1 is 0xe4"),
        ("Mädchen".encode()[:2], "byte 1 is 0xc3"),
        ("text".encode("utf-16"), "byte 0 is 0xff"),
    ],
)
def test_a_file_that_is_no_text_is_refused_before_anything_is_computed(
    tmp_path, data: bytes, message: str
):
    path = tmp_path / "text"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        count_text_bytes(path)
    with pytest.raises(DataError, match=message):
        score_file(None, None, path)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 4, 5])
def test_the_place_of_a_bad_byte_does_not_depend_on_the_blocks(tmp_path, block_bytes: int):
    path = tmp_path / "text"
    path.write_bytes("猫🚤".encode() + b"\xf0\x9f\x9a" + b"abc")
    with pytest.raises(DataError, match="byte 7 is 0xf0"):
        list(read_blocks(path, block_bytes))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text at"):
        count_text_bytes(tmp_path / "nothing")
    with pytest.raises(DataError, match="no text at"):
        count_text_bytes(tmp_path)
