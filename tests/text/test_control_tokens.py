"""Added tokens are found as the library finds them, and texts can be kept from making them."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from jamba_lm.errors import InputError
from jamba_lm.text.control_tokens import NONCHARACTERS, AddedTokenFinder, unused_mark
from jamba_lm.text.tokenizer_file import AddedToken

LETTERS = "<|>ab _é\n"
CONTENTS = st.text("<|>ab", min_size=1, max_size=4)


def token(index: int, content: str, **flags: bool) -> AddedToken:
    given = {"special": True, "control": True, "lstrip": False, "rstrip": False}
    return AddedToken(index, content, **{**given, "single_word": False, **flags})


@hypothesis.given(
    contents=st.lists(CONTENTS, min_size=1, max_size=5, unique=True),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    text=st.text(LETTERS, max_size=30),
)
@hypothesis.settings(max_examples=300)
def test_tokens_are_found_where_the_library_finds_them(contents, flags, text):
    names = dict(zip(("lstrip", "rstrip", "single_word"), flags, strict=True))
    library = LibraryTokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    # Long ones first: the vocabulary already has the single characters.
    library.add_special_tokens([LibraryToken(c, normalized=False, **names) for c in contents])
    finder = AddedTokenFinder(token(library.token_to_id(c), c, **names) for c in contents)
    ids: list[int] = []
    for _, piece in finder.split(text):
        ids += [piece.id] if isinstance(piece, AddedToken) else [LETTERS.index(c) for c in piece]
    assert ids == library.encode(text).ids


@hypothesis.given(
    contents=st.lists(CONTENTS, min_size=1, max_size=5, unique=True), text=st.text(LETTERS)
)
def test_a_disarmed_text_holds_no_token_and_loses_nothing(contents, text):
    finder = AddedTokenFinder(token(i, c) for i, c in enumerate(contents) if len(c) > 1)
    disarmed = finder.disarmed(text, "\ufdd0", frozenset())
    assert all(isinstance(piece, str) for _, piece in finder.split(disarmed))
    assert disarmed.replace("\ufdd0", "") == text


def test_text_that_starts_no_token_stays_as_it_is():
    finder = AddedTokenFinder([token(0, "<|im_end|>"), token(1, "<think>")])
    allowed = frozenset({"<think>"})
    for text in ("plain", "a > b", "<b>bold</b>", "", "<think>"):
        assert finder.disarmed(text, "\ufdd0", allowed) == text
    assert finder.disarmed("<think>", "\ufdd0", frozenset()) != "<think>"


def test_a_mark_is_a_character_that_no_text_holds():
    assert unused_mark(["a", {"\ufdd0": ["\ufdd1"]}]) == "\ufdd2"
    with pytest.raises(InputError, match="non-characters"):
        unused_mark([{"x": "".join(NONCHARACTERS)}])
