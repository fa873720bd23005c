"""A tokenizer.json that nobody vouches for is refused in one line, or works."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from jamba_lm.errors import TokenizerError
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.text.tokenizer_file import read_tokenizer_file
from tests.text.folders import (
    EVERY_FOLDER,
    every_folder,
    folder_of,
    read,
    trained_folder,
    write,
)


def broken(path: str, value: object) -> object:
    """Return the trained tokenizer's document with one value replaced, by a dotted path."""
    document = copy.deepcopy(read(trained_folder("byte-level") / "tokenizer.json"))
    *parents, last = path.split(".")
    where = document
    for key in parents:
        where = where[int(key) if isinstance(where, list) else key]
    where[int(last) if isinstance(where, list) else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model", None, "model is missing"),
        ("model.type", "Unigram", "only 'BPE'"),
        ("model.vocab", {}, "vocab is empty"),
        ("model.vocab", {"a": 0, "b": 0}, "to both"),
        ("model.vocab", {"a": 2**40}, "expected an id"),
        ("model.vocab", {"a": True}, "expected an id"),
        ("model.vocab.\ud800", 5000, "surrogate"),
        ("model.merges", 5, "expected a list"),
        ("model.merges.0", "a b c", "expected two tokens"),
        ("model.merges.0", ["a", "nope"], "not in model.vocab"),
        ("model.unk_token", "<nope>", "not in model.vocab"),
        ("model.dropout", 0.5, "not supported"),
        ("model.continuing_subword_prefix", "##", "not supported"),
        ("model.byte_fallback", "yes", "expected true or false"),
        ("added_tokens", {}, "expected a list"),
        ("added_tokens.0.id", 77, "contradicts"),
        ("added_tokens.0.content", "", "is empty"),
        ("added_tokens.1", {"id": 0, "content": "<|pad|>"}, "added twice"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "not supported"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100},
            "100 times",
        ),
        ("normalizer", {"type": "NFC", "x": 5}, None),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "not supported"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "("}, "cannot understand"),
        ("decoder", None, "without one"),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "not supported"),
        ("decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 1}, "not supported"),
    ],
)
def test_a_broken_tokenizer_json_is_refused_in_one_line(tmp_path, capfd, path, value, expected):
    path_written = tmp_path / "tokenizer.json"
    path_written.write_text(json.dumps(broken(path, value)), encoding="utf-8")
    if expected is None:
        assert load_tokenizer(tmp_path).encode("a")
        return
    with pytest.raises(TokenizerError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path_written) in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


@every_folder
def test_every_token_is_known_by_name_id_and_bytes(name):
    path = folder_of(name) / "tokenizer.json"
    file = read_tokenizer_file(path)
    document = read(path)
    assert file.names == document["model"]["vocab"]
    assert set(file.bytes_by_id) == set(file.names.values())
    assert {token["content"] for token in document["added_tokens"]} == set(file.added)
    assert file.bytes_by_id[file.names["n"]] == b"n"


def test_what_would_cut_or_pad_a_text_is_left_out(tmp_path):
    document = broken("truncation", {"direction": "Right", "max_length": 1, "strategy": "x"})
    document["padding"] = {"strategy": {"Fixed": 10**9}}
    write(tmp_path / "tokenizer.json", document)
    plain = load_tokenizer(trained_folder("byte-level"))
    assert load_tokenizer(tmp_path).encode("a long text") == plain.encode("a long text")


def test_a_regular_expression_that_runs_wild_is_an_error_and_no_hang(tmp_path):
    pattern = {"Regex": "(a+)+$"}
    write(tmp_path / "tokenizer.json", broken("pre_tokenizer.pretokenizers.0.pattern", pattern))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="cannot encode the text"):
        tokenizer.encode("a" * 64 + "b")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**40), 2**40),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["BPE", "Sequence", "ByteLevel", "Split", "Replace", "Fuse", "Metaspace"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=6), st.sampled_from(["type", "id", "content", "pattern"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@st.composite
def mutations(draw):
    """A real tokenizer.json with up to three values replaced, dropped or copied elsewhere."""
    document = copy.deepcopy(draw(st.sampled_from(SMALL_DOCUMENTS)))
    for _ in range(draw(st.integers(1, 3))):
        where = document
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = draw(st.sampled_from(keys[:12]))
            inner = where[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                where = inner
                continue
            change = draw(st.sampled_from(["replace", "drop", "borrow"]))
            if change == "drop":
                del where[key]
            else:
                where[key] = draw(JSON) if change == "replace" else copy.deepcopy(document)
            break
    return document


def small(document: dict) -> dict:
    """Shorten a document so that thousands can be tried."""
    document = copy.deepcopy(document)
    model = document["model"]
    model["merges"] = model["merges"][:8]
    keep = {name for left, right in model["merges"] for name in (left, right, left + right)}
    added = {token["content"] for token in document["added_tokens"]}
    model["vocab"] = {
        name: index
        for name, index in model["vocab"].items()
        if (name.isascii() and len(name) == 1) or name in (*keep, *added, "<0x41>")
    }
    return document


SMALL_DOCUMENTS = [small(read(folder_of(name) / "tokenizer.json")) for name in EVERY_FOLDER]


def test_what_is_mutated_works_to_begin_with(scratch_file):
    for document in SMALL_DOCUMENTS:
        scratch_file.write_text(json.dumps(document), encoding="utf-8")
        assert load_tokenizer(scratch_file).encode("ab 12")


@hypothesis.given(document=mutations())
@hypothesis.settings(max_examples=1200, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_mutated_tokenizer_json_is_refused_or_works(scratch_file, document):
    scratch_file.write_text(json.dumps(document), encoding="utf-8")
    works_or_is_refused(scratch_file)


@hypothesis.given(document=st.dictionaries(st.sampled_from(["model", "decoder", "x"]), JSON))
@hypothesis.settings(max_examples=300)
def test_any_json_is_refused_or_works(scratch_file, document):
    scratch_file.write_text(json.dumps(document), encoding="utf-8")
    works_or_is_refused(scratch_file)


@hypothesis.given(place=st.integers(0, 5000), byte=st.integers(0, 255), length=st.integers(0, 3))
@hypothesis.settings(max_examples=300)
def test_a_file_with_damaged_bytes_is_refused_or_works(scratch_file, place, byte, length):
    data = bytearray(json.dumps(SMALL_DOCUMENTS[0]).encode())
    place %= len(data)
    data[place : place + length] = bytes([byte])
    scratch_file.write_bytes(data)
    works_or_is_refused(scratch_file)


def works_or_is_refused(path: Path) -> None:
    try:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("ab 12 é<|im_end|>", add_bos=False)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    except TokenizerError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "tokenizer.json"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "", "/dev/null", "/proc/self/mem"])
def test_a_path_that_is_no_tokenizer_is_refused(path):
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json"):
        load_tokenizer(tmp_path)
