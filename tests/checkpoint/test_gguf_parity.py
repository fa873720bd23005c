"""GGUF files here and in llama.cpp: the same tokens, logits, continuations and values.

llama.cpp's answers were written down; `benchmarks/llama_cpp_parity.py` says how.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_lm.checkpoint.gguf_blocks import decode
from jamba_lm.conversion import folder_to_gguf
from jamba_lm.gguf_file import BLOCK_TYPES, GgufFile
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.presets import embedded_model_path
from jamba_lm.tensor_file import TensorFile
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from tests.arms import SMALL, shaken_model
from tests.checkpoint.gguf_models import (
    ANSWERS,
    BLOCKS,
    LOGITS,
    MODELS,
    Q4_K_M,
    SENTENCEPIECE,
    TEXTS,
    WIDE,
    model_folder,
    prompts,
)
from tests.tolerances import LLAMA_CPP, assert_within

HELD_OUT = ANSWERS.parents[1] / "held_out.jsonl"
FAMILIES = ("byte-level", "sentencepiece")


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return json.loads(ANSWERS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Load both tokenizers out of GGUF files that we wrote."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pieces = folder / "pieces"
    shaken_model(SMALL.replace(vocab_size=1500)).save(pieces)
    for path in SENTENCEPIECE.iterdir():
        (pieces / path.name).write_bytes(path.read_bytes())
    folder_to_gguf(pieces, folder / "pieces.gguf")
    folder_to_gguf(embedded_model_path(), folder / "demo.gguf")
    return {
        "byte-level": load_tokenizer(folder / "demo.gguf"),
        "sentencepiece": load_tokenizer(folder / "pieces.gguf"),
    }


def greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    state, ids, found = model.new_state(), prompt, []
    for _ in range(count):
        ids = [int(model.next_logits([ids], [state])[0].argmax())]
        found += ids
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_texts_become_llama_cpps_tokens(answers, tokenizers, family):
    for text, theirs in zip(TEXTS, answers["tokens"][family], strict=True):
        assert tokenizers[family].encode(text, add_bos=False) == theirs, text


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_a_template_are_llama_cpps(answers, tokenizers, family):
    for text, theirs in zip(TEXTS, answers["tokens with control tokens"][family], strict=True):
        ours = tokenizers[family].encode(text, add_bos=False, allow_special=True)
        assert ours == theirs, text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_text_becomes_llama_cpps_tokens(answers, tokenizers, family):
    texts = [json.loads(line)["text"] for line in HELD_OUT.open(encoding="utf-8")]
    ids = [tokenizers[family].encode(text, add_bos=False) for text in texts]
    assert sum(map(len, ids)) > 50_000
    digest = hashlib.sha256(b"".join(array("i", [-1, *one]).tobytes() for one in ids))
    assert digest.hexdigest() == answers["tokens of held_out.jsonl"][family]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_what_we_wrote_as_we_do(answers, tmp_path, name):
    folder = model_folder(name, tmp_path / "folder")
    folder_to_gguf(folder, tmp_path / "model.gguf", file_type="f32")
    with TensorFile(LOGITS) as theirs:
        for source in (folder, tmp_path / "model.gguf"):
            model = load(source)
            asked = prompts(model.config)
            for i, (prompt, found) in enumerate(zip(asked, model.logits(asked), strict=True)):
                expected = theirs.tensor(f"{name}: {i}")
                assert_within(found, expected, LLAMA_CPP["fp32"], f"{name}, prompt {i}")
                said = answers["greedy"][name][i]
                assert greedy(model, prompt, len(said)) == said


def test_the_embedded_model_continues_as_in_llama_cpp(answers, tmp_path):
    prompt, said = answers["greedy of the embedded model"]
    folder_to_gguf(embedded_model_path(), tmp_path / "demo.gguf", file_type="f32")
    assert load_tokenizer(tmp_path / "demo.gguf").encode("The history of the city")[1:] == prompt
    assert greedy(load(tmp_path / "demo.gguf"), prompt, len(said)) == said
    assert greedy(load(embedded_model_path(), dtype="fp32"), prompt, len(said)) == said


def test_a_file_of_llama_quantize_gives_its_logits_here(answers):
    model = load(Q4_K_M, dtype="fp32")
    assert model.config == WIDE
    kinds = {place.kind.name for place in GgufFile(Q4_K_M).tensors.values()}
    assert {"Q4_K", "Q6_K", "F32"} <= kinds
    asked = prompts(WIDE)
    with TensorFile(LOGITS) as theirs:
        for i, found in enumerate(model.logits(asked)):
            expected = theirs.tensor(f"q4_k_m: {i}")
            assert_within(found, expected, LLAMA_CPP["quantised activations"], f"prompt {i}")


def test_every_type_is_read_as_ggml_reads_it():
    file = GgufFile(BLOCKS)
    plain = {"F32", "F16", "BF16"}
    assert {name for name in file.tensors if not name.endswith(" read")} == {
        kind.name for kind in BLOCK_TYPES.values()
    } - plain
    for name, place in file.tensors.items():
        if name.endswith(" read"):
            continue
        expected = file.tensors[f"{name} read"]
        ours = decode(file.view(name), place.kind, place.shape, torch.float32)
        theirs = decode(file.view(f"{name} read"), expected.kind, place.shape, torch.float32)
        assert_within(ours, theirs, LLAMA_CPP["decoded values"], name)


def test_a_quantised_file_is_read_into_bfloat16_unless_told_otherwise(tmp_path: Path):
    assert load(Q4_K_M).dtype == torch.bfloat16
    assert load(Q4_K_M, dtype="fp16").dtype == torch.float16
