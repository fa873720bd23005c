"""Training a tokenizer: nothing is lost, digits stand alone, the same text gives the same file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import AutoTokenizer

from jamba_lm.errors import DataError, InputError
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from jamba_lm.text.tokenizer_training import TokenizerRecipe, train_tokenizer
from tests.text.folders import KINDS, SAMPLE, loaded, trained_folder, written

every_kind = pytest.mark.parametrize("kind", KINDS)
SRC = Path(__file__).resolve().parents[2] / "src"

# Characters that tokenizers are known to lose, change or choke on.
AWKWARD = [
    *("\0", "\x01", "\x7f", "\x85", "\u00a0", "\u2028", "\u2029", "\u200b", "\u200d", "\ufeff"),
    *("\ufffd", "\uffff", "\ufdd0", "\U0010ffff", "\u202e", "e\u0301", "é", "각", "\u1112\u1161"),
    *("👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "\U0001f1e9\U0001f1ea", "▁", "Ġ", "ﬁ", "İ", "ß"),
    *("\r\n", "\r", "\n", "\t", "  ", "   ", "٣", "½", "Ⅷ", "²", "१२", "a" * 40, "=" * 80),
    *("<0x41>", "<|im_end|>"),
]
ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(AWKWARD)
    ),
    max_size=12,
).map("".join)


def trained(kind: str) -> Tokenizer:
    return loaded(f"trained {kind}")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the paper's kind


@every_kind
@hypothesis.given(text=ANY_TEXT)
@hypothesis.settings(max_examples=300)
def test_any_text_survives_the_round_trip(kind, text):
    tokenizer = trained(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every_kind
@hypothesis.given(text=st.text("0123456789 ab.-", max_size=40))
def test_every_digit_is_a_token_of_its_own(kind, text):
    tokenizer = trained(kind)
    alone = [tokenizer.token_bytes(one) for one in tokenizer.encode(text, add_bos=False)]
    digits = [data for data in alone if any(byte in b"0123456789" for byte in data)]
    assert digits == [character.encode() for character in text if character.isdigit()]


@every_kind
def test_no_space_is_put_in_front(kind):
    tokenizer = trained(kind)
    first = tokenizer.encode("the", add_bos=False)
    assert b"".join(map(tokenizer.token_bytes, first)) == b"the"
    assert tokenizer.encode(" the", add_bos=False) != first


@every_kind
def test_special_tokens_have_the_ids_that_a_jamba_config_says(kind):
    tokenizer = trained(kind)
    names = [tokenizer.token_name(one) for one in range(5)]
    assert names == ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    assert tokenizer.vocab_size == 700
    assert tokenizer.contradictions == ()


def test_every_byte_is_in_the_vocabulary():
    for kind in KINDS:
        spelled = {trained(kind).token_bytes(one) for one in range(700)}
        assert {bytes([value]) for value in range(256)} <= spelled


@every_kind
@hypothesis.given(text=ANY_TEXT)
def test_transformers_reads_the_folder_and_gives_the_same_ids(kind, text):
    assert oracle(kind)(text).input_ids == trained(kind).encode(text, allow_special=True)


@cache
def oracle(kind: str):
    return AutoTokenizer.from_pretrained(trained_folder(kind))


def test_more_special_tokens_can_be_reserved(tmp_path):
    recipe = TokenizerRecipe(vocab_size=600, specials=("<think>", "</think>", "<|tool|>"))
    text = written(tmp_path, "a.txt", SAMPLE)
    train_tokenizer([text], tmp_path / "out", recipe)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert [tokenizer.token_id(name) for name in recipe.specials] == [5, 6, 7]
    assert tokenizer.encode("<think>", add_bos=False, allow_special=True) == [5]


# -- determinism


@every_kind
def test_the_same_text_gives_the_same_bytes_with_any_number_of_threads(kind, tmp_path):
    text = written(tmp_path, "a.txt", SAMPLE)
    code = (
        "import sys; from pathlib import Path\n"
        "from jamba_lm.text.tokenizer_training import TokenizerRecipe, train_tokenizer\n"
        "train_tokenizer([Path(sys.argv[1])], Path(sys.argv[2]),"
        f" TokenizerRecipe(vocab_size=700, kind={kind!r}))"
    )
    contents = []
    for threads in ("1", "3"):
        out = tmp_path / threads
        environment = {
            **os.environ,
            "PYTHONPATH": str(SRC),
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
            "PYTHONHASHSEED": threads,
        }
        subprocess.run(
            [sys.executable, "-c", code, str(text), str(out)], check=True, env=environment
        )
        contents.append([(out / name).read_bytes() for name in names_in(out)])
    assert contents[0] == contents[1]


def test_a_jsonl_file_gives_what_its_texts_give(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in (SAMPLE, SAMPLE))
    recipe = TokenizerRecipe(vocab_size=600)
    for name, content in (("a.jsonl", lines), ("a.txt", SAMPLE)):
        files = [written(tmp_path, name, content)] * (1 if name == "a.jsonl" else 2)
        train_tokenizer(files, tmp_path / f"{name}-out", recipe, hold_out=False)
    outs = [tmp_path / f"{name}-out" / "tokenizer.json" for name in ("a.jsonl", "a.txt")]
    assert outs[0].read_bytes() == outs[1].read_bytes()


# -- what cannot be read


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("empty.txt", b"", r"empty\.txt' holds no text"),
        ("empty.jsonl", b'{"text": ""}\n', "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8: byte 3 is 0xe9"),
        ("cut.txt", "a€".encode()[:-1], "not UTF-8: byte 1 is 0xe2"),
        ("late.txt", b"line\n" * 10_000 + b"\xff", "not UTF-8: byte 50,000 is 0xff"),
        ("binary.txt", b"GGUF\0\0", "not text: byte 4 is zero"),
        ("a.jsonl", b"plain\n", "line 1 of .*not usable JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', r"line 3 of .*\(byte 15\).*found a int"),
        ("a.jsonl", b'{"body": "a"}\n', "expected a text under 'text', found none"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b"[1]\n", "expected an object"),
    ],
)
def test_an_unusable_file_is_refused_by_name_and_place(tmp_path, name, data, expected):
    path = written(tmp_path, name, data)
    with pytest.raises(DataError, match=expected) as caught:
        train_tokenizer([path], tmp_path / "out", TokenizerRecipe(vocab_size=600))
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == [name]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text at"):
        train_tokenizer([tmp_path / "none"], tmp_path / "out", TokenizerRecipe())
    with pytest.raises(InputError, match="one file or more"):
        train_tokenizer([], tmp_path / "out", TokenizerRecipe())


# -- what is asked for


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "unigram"}, "choose byte-level or byte-fallback"),
        ({"vocab_size": 200}, "expected 262"),
        ({"vocab_size": 2**30}, "to 1,048,576"),
        ({"specials": ("the",)}, "cannot reserve 'the'"),
        ({"specials": ("<a b>",)}, "cannot reserve '<a b>'"),
        ({"specials": ("<|pad|>",)}, "given twice"),
        ({"specials": ("<x>", "<x>")}, "given twice"),
    ],
)
def test_an_impossible_recipe_is_refused(values, expected):
    with pytest.raises(InputError, match=expected):
        TokenizerRecipe(**values)


@every_kind
def test_too_little_text_for_the_vocabulary_is_said(tmp_path, kind):
    path = written(tmp_path, "a.txt", "some text\n" * 50)
    recipe = TokenizerRecipe(vocab_size=4096, kind=kind)
    with pytest.raises(DataError, match=r"supports a vocabulary of \d+ only, not of 4,096"):
        train_tokenizer([path], tmp_path / "out", recipe)
    assert names_in(tmp_path) == ["a.txt"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    path = written(tmp_path, "a.txt", SAMPLE)
    with pytest.raises(InputError, match="exists: name a new folder"):
        train_tokenizer([path], tmp_path, TokenizerRecipe(vocab_size=600))
    assert names_in(tmp_path) == ["a.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    path = written(tmp_path, "a.txt", SAMPLE)
    (tmp_path / "out").mkdir()
    train_tokenizer([path], tmp_path / "out", TokenizerRecipe(vocab_size=600))
    assert names_in(tmp_path / "out") == ["tokenizer.json", "tokenizer_config.json"]


def test_an_interrupted_training_leaves_nothing(tmp_path):
    path = written(tmp_path, "a.txt", SAMPLE)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(
            [path], tmp_path / "out", TokenizerRecipe(vocab_size=600), progress=interrupt
        )
    assert names_in(tmp_path) == ["a.txt"]


def test_a_disk_that_refuses_leaves_nothing(tmp_path):
    path = written(tmp_path, "a.txt", SAMPLE)
    blocked = written(tmp_path, "file", "x") / "out"
    with pytest.raises(InputError, match="cannot write"):
        train_tokenizer([path], blocked, TokenizerRecipe(vocab_size=600))
    assert names_in(tmp_path) == ["a.txt", "file"]


# -- holding out


def test_what_is_held_out_is_not_trained_on(tmp_path):
    documents = [f"document {number} " * 20 for number in range(100)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    path = written(tmp_path, "a.jsonl", lines)
    seen: list[tuple[int, int]] = []
    result = train_tokenizer(
        [path],
        tmp_path / "out",
        TokenizerRecipe(vocab_size=264),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.held_out == (documents[49], documents[99])
    assert result.num_characters == sum(map(len, documents)) - sum(map(len, result.held_out))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)
