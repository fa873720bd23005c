"""Ids become text: the text the library gives, token by token and never half a character."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from jamba_lm.errors import InputError
from jamba_lm.text.decoding import Decoding, TextStream, byte_symbols
from jamba_lm.text.tokenizer import load_tokenizer
from tests.text.folders import (
    TEXTS,
    every_folder,
    folder_of,
    loaded,
    metaspace_folder,
    trained_folder,
)

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@every_folder
@hypothesis.given(text=TEXTS)
def test_encoded_text_decodes_as_the_library_decodes_it(name, text):
    ids = loaded(name).encode(text)
    library = LibraryTokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    assert loaded(name).decode(ids) == library.decode(ids)


@every_folder
@hypothesis.given(ids=st.lists(st.integers(0, 760), max_size=30), skip=st.booleans())
def test_a_stream_gives_the_text_of_decode_for_any_ids(name, ids, skip):
    tokenizer = loaded(name)
    check_stream(tokenizer.stream(skip_special=skip), ids)
    stream = tokenizer.stream(skip_special=skip)
    given = "".join(map(stream.push, ids)) + stream.flush()
    assert given == tokenizer.decode(ids, skip_special=skip)


@st.composite
def vocabularies(draw):
    """Any decoding over any names: byte symbols, byte tokens, spaces of all kinds."""
    symbol = st.sampled_from([*byte_symbols(), "▁", " ", "é", "☃", "\0"])
    name = st.one_of(
        st.lists(symbol, min_size=1, max_size=4).map("".join),
        st.integers(0, 255).map(lambda value: f"<0x{value:02X}>"),
    )
    names = dict(enumerate(draw(st.lists(name, min_size=1, max_size=40))))
    decoding = draw(
        st.builds(
            Decoding,
            byte_level=st.booleans(),
            byte_fallback=st.booleans(),
            replacements=st.sampled_from([(), (("▁", " "),)]),
            dummy=st.sampled_from(["", "▁"]),
            strip=st.just(" "),
            strip_count=st.integers(0, 2),
        )
    )
    return decoding, names


@hypothesis.given(vocabulary=vocabularies(), data=st.data())
@hypothesis.settings(max_examples=300)
def test_a_stream_of_any_vocabulary_gives_what_is_certain_at_once(vocabulary, data):
    decoding, names = vocabulary
    spelled = {index: decoding.spell(name) for index, name in names.items()}
    ids = data.draw(st.lists(st.integers(0, len(names) + 1), max_size=30))
    skipped = frozenset(data.draw(st.sets(st.integers(0, len(names)), max_size=3)))
    check_stream(TextStream(decoding, names, spelled, skipped), ids)


def check_stream(stream: TextStream, ids: list[int]) -> None:
    """Push `ids`; after each, everything but an unfinished character must be out."""
    out = ""
    for place, token in enumerate(ids):
        out += stream.push(token)
        alone = TextStream(stream._decoding, stream._names, stream._bytes_by_id, stream._skipped)
        whole = "".join(map(alone.push, ids[: place + 1])) + alone.flush()
        held_back = whole[len(out) :]
        assert whole.startswith(out)
        # What is held back can only be the U+FFFD that an unfinished character would become.
        assert held_back in ("", UNFINISHED)
    stream.flush()


@every_folder
@hypothesis.given(text=TEXTS)
def test_a_stream_never_gives_half_a_character(name, text):
    tokenizer = loaded(name)
    stream = tokenizer.stream()
    pushed = [stream.push(one) for one in tokenizer.encode(text)]
    assert stream.flush() == ""
    assert "".join(pushed).count(UNFINISHED) == text.count(UNFINISHED)


def test_a_stream_starts_afresh_after_flush():
    tokenizer = load_tokenizer(metaspace_folder("prepend"))
    stream = tokenizer.stream()
    ids = tokenizer.encode(" two")
    first = "".join(map(stream.push, ids)) + stream.flush()
    second = "".join(map(stream.push, ids)) + stream.flush()
    assert first == second == " two"


def test_ids_without_a_token_show_and_negative_ones_are_refused():
    tokenizer = load_tokenizer(trained_folder("byte-level"))
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == UNFINISHED
    with pytest.raises(InputError, match="-1 is no token id"):
        tokenizer.decode([-1])
