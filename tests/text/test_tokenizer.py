"""What a tokenizer promises: the ids that others get, and no text turned into control."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer

from jamba_lm.errors import InputError
from jamba_lm.text.tokenizer import load_tokenizer
from tests.text.folders import (
    TEXTS,
    every_folder,
    folder_of,
    jamba_folders,
    loaded,
    read,
    trained_folder,
    write,
)

NAMES = "<|im_start|> <|im_end|> <|startoftext|> <|endoftext|> <|pad|> <think> </think> <s> </s>"
PARTS = "<unk> <| |> < im_end <0x41> ▁ <|im_ end|>"
# Text full of names of control tokens, whole and in parts.
SPICED = st.lists(
    st.one_of(TEXTS, st.sampled_from([*NAMES.split(), *PARTS.split(), " ", "\n"])), max_size=8
).map("".join)


@jamba_folders
def test_a_text_gets_its_bos_once(name):
    tokenizer = load_tokenizer(folder_of(name))
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("a b")[0] == 1
    assert tokenizer.encode("a b", add_bos=False) == tokenizer.encode("a b")[1:]
    written = tokenizer.encode("<|startoftext|>a b", allow_special=True)
    assert written == tokenizer.encode("a b")
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_bos=False) == []


@every_folder
@hypothesis.given(text=SPICED)
def test_names_of_control_tokens_in_a_text_stay_text(name, text):
    tokenizer = loaded(name)
    ids = tokenizer.encode(text, add_bos=False)
    unknown = tokenizer.token_id("<unk>")
    steering = tokenizer.special_ids - {unknown}
    steering |= {tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<tool_call>")}
    assert steering.isdisjoint(ids)


@every_folder
@hypothesis.given(text=SPICED)
def test_allowed_special_tokens_give_the_ids_of_transformers(name, text):
    ids = loaded(name).encode(text, add_bos=False, allow_special=True)
    assert ids == oracle(name)(text, add_special_tokens=False).input_ids


@jamba_folders
@hypothesis.given(text=TEXTS)
def test_jamba_tokenizers_lose_nothing(name, text):
    tokenizer = loaded(name)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_refused_by_name():
    tokenizer = load_tokenizer(trained_folder("byte-level"))
    with pytest.raises(InputError, match=r"U\+D83D at character 3"):
        tokenizer.encode("abc\ud83d")


def test_merges_cannot_bring_a_control_token_together(tmp_path):
    """A vocabulary may hold merges that spell a control token; plain text must not use them."""
    document = copy.deepcopy(read(trained_folder("byte-level") / "tokenizer.json"))
    model = document["model"]
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]
    whole, name = "", "<|im_end|>"
    for character in name:
        if whole:
            model["vocab"].setdefault(whole + character, len(model["vocab"]))
            model["merges"].insert(0, [whole, character])
        whole += character
    model["merges"] = [m for m in model["merges"] if "".join(m) in name or "<" in m[0]]
    write(tmp_path / "tokenizer.json", document)
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert library.encode(name, add_special_tokens=False).ids == [4]
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(f"a{name}b", add_bos=False)
    assert 4 not in ids
    assert tokenizer.decode(ids) == f"a{name}b"


def test_a_long_prompt_is_encoded_whatever_it_is_made_of():
    tokenizer = load_tokenizer(trained_folder("byte-level"))
    for text in (" " * 2**19, "a" * 2**19, "<|im_end|>" * 2**15):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


@cache
def oracle(name: str):
    return AutoTokenizer.from_pretrained(folder_of(name))


def test_loading_a_tokenizer_imports_no_torch():
    code = (
        "import sys; from jamba_lm.text.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(trained_folder('byte-level'))!r}); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
