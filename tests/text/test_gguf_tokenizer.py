"""Tokenizers into GGUF headers and out of them: the same ids, or a line that says why not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, pre_tokenizers, trainers

from jamba_lm.errors import JambaError, TokenizerError
from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_output import Typed, write_gguf
from jamba_lm.presets import embedded_model_path
from jamba_lm.text.gguf_tokenizer import folder_files, open_documents
from jamba_lm.text.gguf_vocabulary import WHOLE_FILE, merge_scores, no_vocabulary, read_vocabulary
from jamba_lm.text.pre_tokenizers import CUTS, as_pre_tokenizer, cut_of, named_cut
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from jamba_lm.text.tokenizer_training import PRE_TOKEN_PATTERN
from tests.checkpoint.gguf_models import MARKED, SENTENCEPIECE, TEXTS
from tests.tiny_checkpoint import CHATML_TEMPLATE, SPECIAL_TOKENS, TINY_TEXT, write_tiny_tokenizer

ROWS = 1600
Change = Callable[[dict[str, Any]], Any]


def byte_level_folder(folder: Path, pre_tokenizer: dict[str, Any], **model: Any) -> Path:
    """Train a byte-level tokenizer that cuts text in some way."""
    frame = {"type": "BPE", "vocab": {}, "merges": []}
    blank = json.dumps({"version": "1.0", "pre_tokenizer": pre_tokenizer, "model": frame})
    tokenizer = LibraryTokenizer.from_str(blank)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT * 3, *TEXTS * 3], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(tokenizer.to_str())
    document["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"})
    )
    return folder


def copy_of(source: Path, folder: Path, change: Change | None = None) -> Path:
    """Copy the tokenizer files of a folder, with tokenizer.json changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        document = json.loads((source / name).read_text(encoding="utf-8"))
        if change is not None and name == "tokenizer.json":
            change(document)
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


def through_a_file(folder: Path, *, without: tuple[str, ...] = (), **changes: Typed) -> Tokenizer:
    """Write a header of a folder's tokenizer, less some keys, and read it."""
    values = {
        key: value
        for key, value in read_vocabulary(
            folder, ROWS if "1500" not in folder.name else 1500
        ).values.items()
        if key not in without
    }
    write_gguf(folder / "x.gguf", values | changes, [])
    return load_tokenizer(folder / "x.gguf")


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
def test_every_way_to_cut_comes_back_by_its_name(tmp_path, cut):
    folder = byte_level_folder(tmp_path / "x", as_pre_tokenizer(cut), ignore_merges=cut.whole_words)
    before = load_tokenizer(folder)
    with_file, by_name = through_a_file(folder), through_a_file(folder, without=(WHOLE_FILE,))
    assert GgufFile(folder / "x.gguf").get("tokenizer.ggml.pre") == cut.name
    for text in TEXTS if cut.except_for else (*TEXTS, MARKED):
        ids = before.encode(text, add_bos=False)
        assert with_file.encode(text, add_bos=False) == ids
        assert by_name.encode(text, add_bos=False) == ids
        assert by_name.decode(ids) == text
    assert (by_name.bos_id, by_name.eos_ids) == (before.bos_id, before.eos_ids)


def test_our_own_way_to_cut_has_a_relative_and_its_difference_is_said():
    cut = next(cut for cut in CUTS if cut.pattern == PRE_TOKEN_PATTERN)
    assert "combining marks" in cut.except_for
    assert named_cut(cut.name).pattern != PRE_TOKEN_PATTERN
    assert cut_of(as_pre_tokenizer(cut), whole_words=False) == cut
    (note,) = read_vocabulary(embedded_model_path(), 4096).notes
    assert "combining marks" in note


@hypothesis.given(text=st.text(max_size=60))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sentencepiece_scores_say_the_same_as_merges(tmp_path_factory, text):
    folder = copy_of(SENTENCEPIECE, tmp_path_factory.mktemp("pieces"))
    before = load_tokenizer(folder)
    after = through_a_file(folder, without=(WHOLE_FILE,))
    assert after.encode(text) == before.encode(text)


def test_a_space_is_put_in_front_where_the_file_says_so(tmp_path):
    def add_dummy(document: dict[str, Any]) -> None:
        document["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})
        document["decoder"]["decoders"].append(
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        )

    folder = copy_of(SENTENCEPIECE, tmp_path / "dummy", add_dummy)
    before = load_tokenizer(folder)
    for without in ((WHOLE_FILE,), (WHOLE_FILE, "tokenizer.ggml.add_space_prefix")):
        after = through_a_file(folder, without=without)
        for text in TEXTS:
            ids = before.encode(text)
            assert after.encode(text) == ids
            assert after.decode(ids) == text
    plain = through_a_file(copy_of(SENTENCEPIECE, tmp_path / "plain"), without=(WHOLE_FILE,))
    assert plain.encode("the") != before.encode("the")


@pytest.mark.parametrize(
    ("scheme", "dummy", "words"),
    [
        ("never", False, ""),
        ("always", True, "in front of texts that begin with one, too"),
        ("first", True, "begin with one and what follows a control token, too"),
    ],
)
def test_the_newer_spelling_of_spaces_is_understood(tmp_path, scheme, dummy, words):
    def respell(document: dict[str, Any]) -> None:
        spaces = {"type": "Metaspace", "replacement": "▁", "split": False}
        document.update(normalizer=None, pre_tokenizer=spaces | {"prepend_scheme": scheme})

    folder = copy_of(SENTENCEPIECE, tmp_path / "x", respell)
    vocabulary = read_vocabulary(folder, ROWS)
    assert vocabulary.values["tokenizer.ggml.add_space_prefix"] == ("bool", dummy)
    assert words in " ".join(vocabulary.notes)
    before, after = load_tokenizer(folder), through_a_file(folder, without=(WHOLE_FILE,))
    for text in TEXTS:
        if not text.startswith(" "):
            assert after.encode(text) == before.encode(text)


def test_scores_that_are_all_the_same_are_not_believed(tmp_path, caplog):
    """As llama.cpp's converter writes them for a folder without tokenizer.model."""
    folder = copy_of(SENTENCEPIECE, tmp_path / "x")
    before = load_tokenizer(folder)
    with caplog.at_level(logging.WARNING):
        after = through_a_file(
            folder,
            without=(WHOLE_FILE,),
            **{"tokenizer.ggml.scores": ("float32[]", [-1000.0] * ROWS)},
        )
    assert "the order of ids is taken instead" in caplog.text
    assert all(after.encode(text) == before.encode(text) for text in TEXTS)


def several(document: dict[str, Any]) -> int:
    """Return the place of a merge that is one of several for its token."""
    made = [merge.replace(" ", "") for merge in document["model"]["merges"]]
    return next(i for i, name in enumerate(made) if name == made[i + 1])


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        (
            "byte-level",
            lambda d: d.update(normalizer={"type": "NFC"}),
            "normalizer NFC changes texts before they are cut",
        ),
        (
            "byte-level",
            lambda d: d["model"].update(ignore_merges=True),
            "ignore_merges is true, but with this pre_tokenizer",
        ),
        (
            "byte-level",
            lambda d: d.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": False},
                        as_pre_tokenizer(CUTS[0]),
                    ],
                }
            ),
            "llama.cpp cannot cut a text as this",
        ),
        (
            "sentencepiece",
            lambda d: d.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKEN_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
            "with pre_tokenizer Split has no counterpart",
        ),
        ("sentencepiece", lambda d: d.update(normalizer=None), "normalizer none"),
        (
            "sentencepiece",
            lambda d: d["model"].update(byte_fallback=False),
            "neither byte-level nor",
        ),
        (
            "sentencepiece",
            lambda d: d["model"]["vocab"].pop("<0x41>"),
            "no token <0x41>, and llama.cpp needs all 256",
        ),
        (
            "sentencepiece",
            lambda d: d["model"]["merges"].pop(100),
            "cannot make .* but llama.cpp would",
        ),
        (
            "sentencepiece",
            # One of several ways to make one token.
            lambda d: d["model"]["merges"].append(d["model"]["merges"].pop(several(d))),
            "makes? .* in two places of the list",
        ),
    ],
)
def test_a_tokenizer_without_a_counterpart_is_refused_with_the_reason(
    tmp_path, source, change, words
):
    origin = embedded_model_path() if source == "byte-level" else SENTENCEPIECE
    folder = copy_of(origin, tmp_path / "x", change)
    with pytest.raises(TokenizerError, match=words) as caught:
        read_vocabulary(folder, 5000)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_model_with_fewer_rows_than_tokens_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="has the id 1499, but the model has 1499 rows"):
        read_vocabulary(copy_of(SENTENCEPIECE, tmp_path / "x"), 1499)


def test_unused_rows_are_filled_and_forgotten_again(tmp_path):
    folder = copy_of(SENTENCEPIECE, tmp_path / "x")
    vocabulary = read_vocabulary(folder, ROWS)
    assert len(vocabulary.values["tokenizer.ggml.tokens"][1]) == ROWS
    assert vocabulary.values["tokenizer.ggml.tokens"][1][-1] == f"[PAD{ROWS - 1}]"
    after = through_a_file(folder, without=(WHOLE_FILE,))
    assert after.vocab_size == 1500
    assert after.token_id(f"[PAD{ROWS - 1}]") is None


def test_stop_ids_and_templates_come_along(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    write_tiny_tokenizer(folder, CHATML_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    values = read_vocabulary(folder, ROWS).values
    # llama.cpp knows a first and a second: the chat's own comes first.
    assert values["tokenizer.ggml.eos_token_id"] == ("uint32", 5)
    assert values["tokenizer.ggml.eot_token_id"] == ("uint32", 2)
    before, after = load_tokenizer(folder), through_a_file(folder, without=(WHOLE_FILE,))
    assert after.eos_ids == before.eos_ids == (2, 5)
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    assert after.chat_ids(messages) == before.chat_ids(messages)


def test_a_second_template_keeps_its_name(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    write_tiny_tokenizer(folder, CHATML_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}!")
    assert through_a_file(folder).chat_template is not None
    files = folder_files(open_documents(folder / "x.gguf"))
    assert files["tokenizer_config.json"]["chat_template"] == [
        {"name": "default", "template": CHATML_TEMPLATE},
        {"name": "tool_use", "template": "{{ tools }}!"},
    ]


def test_more_stops_than_llama_cpp_knows_are_said(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    write_tiny_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4, 5]}))
    assert "1 are left out" in " ".join(read_vocabulary(folder, ROWS).notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": ("string", "rwkv")}, "only 'gpt2' and 'llama' are supported"),
        ({"tokenizer.ggml.model": ("uint32", 4)}, "expected string"),
        ({"tokenizer.ggml.pre": ("string", "kimi-k2")}, "'kimi-k2', a way to cut text that is not"),
        ({"tokenizer.ggml.pre": ("bool", True)}, "expected string"),
        ({"tokenizer.ggml.merges": ("string[]", ["ab"])}, "does not hold two tokens"),
        ({"tokenizer.ggml.merges": ("string[]", ["a nope"])}, "is not in model.vocab"),
        ({"tokenizer.ggml.tokens": ("string[]", ["a", "a"])}, "types of them"),
        ({"tokenizer.ggml.token_type": ("int32[]", [1] * 3)}, "but 3 types of them"),
        ({"tokenizer.ggml.bos_token_id": ("uint32", 99999)}, "is token 99999, but there are 1600"),
        ({"tokenizer.ggml.eos_token_id": ("string", "x")}, "expected a token id"),
        ({"tokenizer.chat_template": ("uint32", 1)}, "expected a text"),
        ({"tokenizer.chat_template": ("string", "{% for %}")}, "template"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, changes, words):
    folder = copy_of(embedded_model_path(), tmp_path / "x")
    values = dict(read_vocabulary_of(folder)) | changes
    write_gguf(tmp_path / "x.gguf", values, [])
    with pytest.raises(TokenizerError, match=words) as caught:
        load_tokenizer(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def read_vocabulary_of(folder: Path) -> dict[str, Typed]:
    def shrink(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        document["model"]["vocab"] = {name: i for name, i in vocab.items() if i < 1000}
        kept = document["model"]["vocab"]
        document["model"]["merges"] = [
            [left, right] for left, right in document["model"]["merges"] if left + right in kept
        ]

    values = dict(read_vocabulary(copy_of(folder, folder, shrink), ROWS).values)
    del values[WHOLE_FILE]
    return values


def test_the_whole_file_must_agree_with_the_tokens(tmp_path):
    folder = copy_of(SENTENCEPIECE, tmp_path / "x")
    tokens = list(read_vocabulary(folder, ROWS).values["tokenizer.ggml.tokens"][1])
    tokens[700], tokens[701] = tokens[701], tokens[700]
    with pytest.raises(JambaError, match="one of them was changed"):
        through_a_file(folder, **{"tokenizer.ggml.tokens": ("string[]", tokens)})


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    for number, values in enumerate((no_vocabulary().values, {})):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, values, [])
        with pytest.raises(TokenizerError, match="says nothing of a tokenizer"):
            load_tokenizer(path)


def test_scores_follow_the_order_of_merges(tmp_path):
    from jamba_lm.text.tokenizer_file import read_tokenizer_file

    path = SENTENCEPIECE / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    scores = merge_scores(vocab, read_tokenizer_file(path), merges)
    made = ["".join(merge.split(" ")) for merge in merges]
    assert scores[made[0]] > scores[made[-1]] > scores["a"]
    assert set(scores) == set(vocab)
