"""Files become documents, and what is none is said and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from jamba_lm.corpus.compressed import lines
from jamba_lm.corpus.document import Document, Unusable
from jamba_lm.corpus.reading import read_file
from jamba_lm.corpus.recipe import DocumentsSection, Source
from jamba_lm.errors import DataError
from tests.corpus.corpora import prepared, sentence_text, stage_of, texts_of, write_jsonl

LIMITS = DocumentsSection()


def records(path: Path, limits: DocumentsSection = LIMITS, **changes: object) -> list[object]:
    source = Source(name="a", files=("*",), **changes)
    return list(read_file(path, source, limits))


def seen(path: Path, limits: DocumentsSection = LIMITS, **changes: object) -> list[str]:
    """Return the text of documents and the reason of others, in order."""
    return [
        record.text if isinstance(record, Document) else f"!{record.reason}"
        for record in records(path, limits, **changes)
    ]


LINES = b'{"text": "one"}\n\n{"text": "two\\nlines", "id": 3}\r\n{"text": "last"}'


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", lambda data: data),
        ("a.ndjson", lambda data: data),
        ("a.jsonl.gz", gzip.compress),
        ("A.JSONL.GZ", gzip.compress),
        ("a.jsonl.gz", lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:])),
        ("a.jsonl.zst", zstandard.compress),
        ("a.jsonl.zst", lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:])),
    ],
)
def test_json_lines_are_read_packed_or_not(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(LINES))
    assert seen(path) == ["one", "two\nlines", "last"]
    assert [record.place for record in records(path)] == [f"{name}:{n}" for n in (1, 3, 4)]
    assert [record.position for record in records(path)] == [0, 1, 2]


def test_parquet_is_read_by_column(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["one", None, "two"] * 200, "n": list(range(600))})
    parquet.write_table(table, path)
    assert seen(path, field="body") == ["one", "!no text", "two"] * 200
    assert seen(path, field="n") == ["!no text"] * 600
    assert seen(path, field="text") == ["!broken file"]
    path.write_bytes(path.read_bytes()[:-20])
    assert seen(path, field="body") == ["!broken file"]


def test_plain_text_is_one_document_or_many(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n%\nthree\r\n%\r\n\n%\n")
    assert seen(path) == ["one\ntwo\n%\nthree\r\n%\r\n\n%\n"]
    assert seen(path, separator="%") == ["one\ntwo", "three\r", "!empty"]
    assert [record.place for record in records(path, separator="%")] == [
        "a.txt:1",
        "a.txt:4",
        "a.txt:6",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "utf-16"])
def test_plain_text_is_read_in_its_encoding(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("Mädchen aß".encode(encoding))
    assert seen(path, encoding=encoding) == ["Mädchen aß"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert seen(path) == ["one"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"abc\xff", "not utf-8"),
        (b"abc\0def", "binary"),
        (b"x" * 101, "too long"),
        ("ä".encode() * 51, "too long"),
        (b"ab", "too short"),
    ],
)
def test_a_text_that_is_no_document_says_why(tmp_path, data, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    limits = DocumentsSection(maximum_bytes=100, minimum_characters=3)
    assert seen(path, limits) == [f"!{reason}"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"[1]", "no text"),
        (b"{}", "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "a\\u0000b"}', "binary"),
        (b'{"text": "a\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "not utf-8"),
    ],
)
def test_a_broken_line_costs_no_other_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    assert seen(path) == ["before", f"!{reason}", "after"]


def test_a_huge_document_is_never_held_in_memory(tmp_path):
    """A line of 40 MB under a limit of a thousand bytes, and the line after it."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(40):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    import tracemalloc

    tracemalloc.start()
    try:
        found = seen(path, DocumentsSection(maximum_bytes=1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == ["!too long", "after"]
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)]
)
def test_a_packed_file_that_ends_early_gives_what_was_whole(tmp_path, name, pack):
    texts = [sentence_text(number) for number in range(1000)]
    data = pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    found = seen(path)
    assert found[-1] == "!broken file"
    assert 100 < len(found) < 999
    assert found[:-1] == texts[: len(found) - 1]
    path.write_bytes(b"no archive at all")
    assert seen(path) == ["!broken file"]


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        seen(tmp_path / "missing.txt")


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 40))
def test_lines_are_lines_whatever_their_length(parts, limit):
    class Drip:
        """Reads a few bytes at a time, so that a line lies in many blocks."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def read(self, _: int) -> bytes:
            block, self.data = self.data[:3], self.data[3:]
            return block

    data = b"\n".join(parts)
    expected = [(line[:limit], len(line)) for line in data.split(b"\n")]
    if expected[-1][1] == 0:
        expected.pop()
    assert list(lines(Drip(data), limit)) == expected


@settings(max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"]),
    st.booleans(),
)
def test_no_bytes_are_a_crash(tmp_path_factory, data, name, packed):
    path = tmp_path_factory.mktemp("fuzz") / name
    if packed and name.endswith(".gz"):
        data = gzip.compress(data)
    if packed and name.endswith(".zst"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    for record in records(path, DocumentsSection(maximum_bytes=64)):
        if isinstance(record, Document):
            assert record.text.strip()
            assert len(record.text.encode()) <= 64
        else:
            assert isinstance(record, Unusable)
            assert record.reason


def test_what_datatrove_reads_can_be_a_source(tmp_path):
    """Its CSV reader stands for all of them: one file a unit, options under its own names."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        rows = [f'"{sentence_text(10 * number + row)}"' for row in range(3)]
        (tmp_path / f"in/{number}.csv").write_text("\n".join(["body", *rows]) + "\n")
    source = {
        "name": "table",
        "format": "datatrove",
        "reader": "CSVReader",
        "reader_options": {"data_folder": str(tmp_path / "in"), "text_key": "body"},
    }
    corpus = prepared(tmp_path, source=[source], execution={"tasks": 2})
    assert stage_of(corpus, "table", "read")["documents_out"] == 6
    write_jsonl(tmp_path / "same.jsonl", (sentence_text(n) for n in (0, 1, 2, 10, 11, 12)))
    same = prepared(tmp_path, "same", source=[{"name": "table", "files": ["same.jsonl"]}])
    assert texts_of(corpus) == texts_of(same)
