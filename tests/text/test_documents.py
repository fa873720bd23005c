"""A file of text is its documents in order, or one error that says where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import DataError
from jamba_lm.presets import embedded_model_path
from jamba_lm.text.documents import read_documents, sample_sequences
from jamba_lm.text.tokenizer import load_tokenizer


def test_a_plain_text_is_one_document(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text('{"text": 1}\n')
    assert list(read_documents(path)) == ['{"text": 1}\n']


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 2"),
        (b"[1]", "no text"),
        (b'{"txt": "a"}', "no text"),
        (b'{"text": ""}', "no text"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "line 2"),
        (b"[" * 100_000, "line 2"),
    ],
)
def test_an_unusable_line_is_named(tmp_path, line, says):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=says) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_one_error(tmp_path_factory, content):
    path: Path = tmp_path_factory.mktemp("fuzz") / "any.jsonl"
    path.write_bytes(content)
    try:
        texts = list(read_documents(path))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(texts)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text at"):
        list(read_documents(tmp_path / "none.jsonl"))


def test_a_sample_comes_from_all_over_a_file(tmp_path):
    tokenizer = load_tokenizer(embedded_model_path())
    path = tmp_path / "text.jsonl"
    documents = [f"Document {number}. " + "All of it. " * (number % 7) for number in range(600)]
    documents.append("The last one is long. " * 4000)
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), "utf-8")
    found = sample_sequences(path, tokenizer, 2000, length=100)
    assert found == sample_sequences(path, tokenizer, 2000, length=100)
    assert sum(map(len, found)) == 2000
    assert max(map(len, found)) <= 100
    texts_found = [tokenizer.decode(ids) for ids in found]
    assert any("is long" in one for one in texts_found)
    numbers = [int(one.split()[1].rstrip(".")) for one in texts_found if "Document" in one]
    assert min(numbers) < 150
    assert max(numbers) > 450
    everything = sample_sequences(path, tokenizer, 10**6)
    assert sum("Document" in tokenizer.decode(ids) for ids in everything) == 600
