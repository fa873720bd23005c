"""A folder to a GGUF file and back, whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from jamba_lm.conversion import folder_to_gguf, gguf_to_folder
from jamba_lm.errors import CheckpointError, InputError, TokenizerError
from jamba_lm.generation import generate
from jamba_lm.language_model import load
from jamba_lm.presets import embedded_model_path
from jamba_lm.text.tokenizer import load_tokenizer
from tests.arms import SMALL, shaken_model
from tests.tiny_checkpoint import write_json, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


def test_the_embedded_model_survives_both_ways(tmp_path):
    done = folder_to_gguf(embedded_model_path(), tmp_path / "demo.gguf")
    assert done.tokenizer == "gpt2"
    assert done.num_bytes < 16_000_000
    gguf_to_folder(tmp_path / "demo.gguf", tmp_path / "demo")
    before, after = embedded_model_path(), tmp_path / "demo"
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((after / name).read_text()) == json.loads((before / name).read_text())
    models, tokenizers = [load(p) for p in (before, after)], [*map(load_tokenizer, (before, after))]
    prompt = tokenizers[0].encode("The history of")
    assert tokenizers[1].encode("The history of") == prompt
    said = [[one.id for one in generate(m, prompt, max_new_tokens=12)] for m in models]
    assert said[0] == said[1]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizers[0].chat_ids(chat) == tokenizers[1].chat_ids(chat)


def test_a_file_that_is_there_is_not_overwritten_unasked(folder, tmp_path):
    target = tmp_path / "x.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match="ask to overwrite"):
        folder_to_gguf(folder, target)
    assert target.read_bytes() == b"mine"
    folder_to_gguf(folder, target, overwrite=True)
    assert load(target).config == load(folder).config


def test_a_folder_that_is_there_is_not_overwritten_unasked(folder, tmp_path):
    folder_to_gguf(folder, tmp_path / "x.gguf")
    shutil.copytree(folder, tmp_path / "there")
    write_json(tmp_path / "there" / "tokenizer.json", {"mine": True})
    (tmp_path / "there" / "README.md").write_text("mine")
    with pytest.raises(InputError, match="already holds a checkpoint"):
        gguf_to_folder(tmp_path / "x.gguf", tmp_path / "there")
    gguf_to_folder(tmp_path / "x.gguf", tmp_path / "there", overwrite=True)
    load_tokenizer(tmp_path / "there")
    assert (tmp_path / "there" / "README.md").read_text() == "mine"


def test_a_folder_without_a_tokenizer_gives_a_file_of_ids(tmp_path):
    shaken_model(SMALL).save(tmp_path / "folder")
    done = folder_to_gguf(tmp_path / "folder", tmp_path / "x.gguf")
    assert done.tokenizer == "none"
    assert "no tokenizer.json" in " ".join(done.notes)
    with pytest.raises(TokenizerError, match="says nothing of a tokenizer"):
        load_tokenizer(tmp_path / "x.gguf")
    back = gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    assert back.tokenizer == "none"
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_a_tokenizer_may_be_left_behind(folder, tmp_path):
    done = folder_to_gguf(folder, tmp_path / "x.gguf", tokenizer=False)
    assert (done.tokenizer, done.notes) == ("none", ())


def test_stored_types_are_not_rounded_on_the_way(tmp_path):
    """Norms in float32 beside matrices in bfloat16: a model has one type, a file need not."""
    from safetensors.torch import load_file, save_file

    shaken_model(SMALL, dtype="bf16").save(tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    weights = load_file(path)
    gain = torch.full((32,), 1.0 + 2.0**-20)
    weights["model.layers.0.input_layernorm.weight"] = gain
    save_file(weights, path, {"format": "pt"})
    folder_to_gguf(tmp_path / "folder", tmp_path / "x.gguf")
    after = load(tmp_path / "x.gguf", dtype="fp32")
    assert torch.equal(after.decoder.get_parameter("blocks.0.mixer_norm.weight"), gain)


def test_a_failure_leaves_nothing(folder, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError):
        gguf_to_folder(tmp_path / "broken.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        folder_to_gguf(tmp_path / "nowhere", tmp_path / "out.gguf")
    broken = shutil.copytree(folder, tmp_path / "folder")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):
        folder_to_gguf(broken, tmp_path / "out.gguf")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["broken.gguf", "folder"]


def test_a_folder_for_the_file_is_made(folder, tmp_path):
    folder_to_gguf(folder, tmp_path / "a" / "b" / "x.gguf", file_type="q4_0")
    assert (tmp_path / "a" / "b" / "x.gguf").is_file()
