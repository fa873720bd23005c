"""A prepared folder is what its manifest says, or one error says what is wrong."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from jamba_lm.corpus.prepared import PreparedCorpus
from jamba_lm.corpus.shard_file import Shard
from jamba_lm.errors import DataError
from tests.corpus.corpora import (
    prepared,
    report_of,
    sentence_text,
    stage_of,
    texts_of,
    token_corpus,
    write_jsonl,
)


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    return token_corpus(tmp_path / "c", {"a": [[5, 1, 7], [3]], "b": [[9]]})


def shard_path(corpus: PreparedCorpus) -> Path:
    return corpus.folder / corpus.sources[0].train[0].file


def test_a_shard_is_read_by_others_too(corpus):
    with safe_open(shard_path(corpus), "np") as file:
        assert file.get_tensor("ids").tolist() == list(range(100, 113))
        assert file.get_tensor("starts").tolist() == [0, 5, 6, 13]
        assert file.get_tensor("hashes").shape == (3, 16)


def test_documents_lie_in_shards_of_about_the_size_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", map(sentence_text, range(40)))
    sections = {"source": [{"name": "a", "files": ["a.jsonl"]}], "split": {"validation": 0}}
    small = prepared(tmp_path, "small", **sections, tokens={"shard_tokens": 2048})
    large = prepared(tmp_path, "large", **sections)
    assert len(large.sources[0].train) == 1
    assert len(small.sources[0].train) > 4
    assert all(entry.tokens <= 2048 for entry in small.sources[0].train)
    assert texts_of(small) == texts_of(large)
    hashes = [bytes(row) for row in large.open(large.sources[0].train[0]).hashes]
    assert hashes == sorted(hashes)


def test_every_byte_is_compared_when_that_is_asked_for(corpus):
    count = sum(path.stat().st_size for path in (corpus.folder / "shards").iterdir())
    assert corpus.verify() == count
    path = shard_path(corpus)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="not what was written"):
        PreparedCorpus(corpus.folder).verify()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "not usable JSON|not a whole shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a whole shard"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "not a whole shard"),
        (lambda path: path.write_bytes(b"\xff" * 100), "not a whole shard"),
        (
            lambda path: path.write_bytes((path.parent / "b-train-00000.safetensors").read_bytes()),
            "manifest says 3 with 13",
        ),
    ],
    ids=["gone", "empty", "cut", "longer", "noise", "another"],
)
def test_a_changed_shard_is_noticed_when_the_corpus_is_opened(corpus, damage, word):
    damage(shard_path(corpus))
    with pytest.raises(DataError, match=word):
        PreparedCorpus(corpus.folder)


@settings(max_examples=80)
@given(st.integers(0, 600), st.binary(min_size=1, max_size=12))
def test_no_damage_of_a_header_is_a_crash(tmp_path_factory, place, noise):
    folder = tmp_path_factory.mktemp("fuzz")
    path = shard_path(token_corpus(folder / "c", {"a": [[5, 1, 7]]}))
    data = bytearray(path.read_bytes())
    place = min(place, len(data))
    data[place : place + len(noise)] = noise
    path.write_bytes(data)
    try:
        shard = Shard(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert shard.starts[-1] == len(shard.ids)


def test_a_manifest_that_is_missing_or_broken_says_what_to_do(corpus, tmp_path):
    with pytest.raises(DataError, match="no corpus in"):
        PreparedCorpus(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="not finished"):
        PreparedCorpus(tmp_path)
    path = corpus.folder / "corpus.json"
    manifest = json.loads(path.read_text())
    for change, word in (
        ({"format": "other"}, "its format is 'other'"),
        ({"sources": [{"name": "a"}]}, "not what a preparation writes"),
        ({"bos_id": "x"}, "not what a preparation writes"),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(DataError, match=word):
            PreparedCorpus(corpus.folder)


def test_large_vocabularies_take_wider_ids(tmp_path):
    corpus = token_corpus(tmp_path / "c", {"a": [[70_000]]})
    shard = corpus.open(corpus.sources[0].train[0])
    assert shard.ids.dtype == np.uint32
    assert int(shard.ids[-1]) == 70_099


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag that a document has smuggled in."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_shows_samples_and_no_document_can_write_into_it(tmp_path):
    attack = "<script>alert(1)</script> </pre> & \x1b[31m "
    write_jsonl(
        tmp_path / "a.jsonl",
        [attack + sentence_text(0, 200), attack, *map(sentence_text, range(1, 9))],
    )
    (tmp_path / "<b>.txt").write_bytes(b"\0<img src=x>")
    corpus = prepared(
        tmp_path,
        source=[
            {"name": "a", "files": ["a.jsonl", "<b>.txt"], "stages": ["gopher_quality"]},
        ],
    )
    page = Page()
    text = (corpus.folder / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 1
    assert "<b>.txt" in page.text
    assert "short doc 1" in page.text
    assert "\x1b" not in text
    assert "\\x1b[31m" in page.text


def test_the_report_keeps_a_few_samples_of_each_reason(tmp_path):
    texts = [f"short {number}" for number in range(50)]
    write_jsonl(tmp_path / "a.jsonl", [*texts, *map(sentence_text, range(50))])
    source = {"name": "a", "files": ["a.jsonl"], "stages": ["gopher_quality"]}
    corpus = prepared(tmp_path, source=[source], report={"samples": 4, "sample_characters": 40})
    stage = stage_of(corpus, "a", "gopher_quality")
    assert stage["dropped"] == {"short doc": 50}
    assert len(stage["samples"]["short doc"]) == 4
    kept = stage_of(corpus, "a", "kept")["samples"]["kept"]
    assert [len(sample["text"]) for sample in kept] == [43] * 4
    assert (
        report_of(corpus)["total"]["train"]["documents"]
        + report_of(corpus)["total"]["validation"]["documents"]
        == 50
    )
