"""`jamba convert`, and every command that takes a GGUF file where it takes a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jamba_lm.cli.main import main
from jamba_lm.language_model import load
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tolerances import ORACLE, assert_within


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, and beside it the same as a GGUF file."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("convert") / "model")
    assert main(["convert", str(folder), f"{folder}.gguf", "--type", "f32"]) == 0
    return folder


def test_both_directions_say_what_was_written(model, tmp_path, capsys):
    assert main(["convert", f"{model}.gguf", str(tmp_path / "back"), "--dtype", "fp16"]) == 0
    printed = capsys.readouterr()
    assert "float16 weights" in printed.out
    assert "tokenizer: gpt2" in printed.out
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    out = str(tmp_path / "again.gguf")
    assert main(["convert", str(tmp_path / "back"), out, "--type", "q8_0", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["target"] == out
    assert values["values_by_type"]["Q8_0"] > values["values_by_type"]["F32"]
    assert any("F16" in note for note in values["notes"])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_folder_becomes_one_that_others_read(model, tmp_path, capsys, scheme):
    packed, plain = str(tmp_path / "packed"), str(tmp_path / "plain")
    assert main(["quantize", str(model), "--scheme", scheme, "--out", packed]) == 0
    capsys.readouterr()
    assert main(["convert", packed, plain, "--dtype", "fp32", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["notes"] == ["the folder is quantised: written is what its matrices stand for"]
    assert set(values["values_by_type"]) == {"float32"}
    assert main(["convert", packed, f"{plain}.gguf", "--type", "f32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"][-1:] == values["notes"]
    said = []
    for name in (packed, plain, f"{plain}.gguf"):
        assert main(["generate", name, "--prompt", "Once", "--temperature", "0", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["ids"])
    assert said[0] == said[1] == said[2]
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype="float32")
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits[0]
    # By the definition: native products of packed weights keep 16 bits of a float32 row.
    (ours,) = load(packed, backend="reference").logits(ids.tolist())
    assert_within(ours, logits, ORACLE["fp32"])


def test_packed_matrices_come_in_the_type_of_the_rest(model, tmp_path, capsys):
    half, packed, plain = (str(tmp_path / name) for name in ("half", "packed", "plain"))
    assert main(["convert", str(model), half, "--dtype", "bf16"]) == 0
    assert main(["quantize", half, "--scheme", "int8", "--out", packed]) == 0
    capsys.readouterr()
    assert main(["convert", packed, plain, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values_by_type"]
    assert set(values) == {"bfloat16", "float32"}
    assert values["bfloat16"] > 10 * values["float32"]
    assert (
        load(plain).decoder.get_parameter("blocks.0.mixer.in_proj.weight").dtype == torch.bfloat16
    )


def test_a_folder_is_written_again_in_another_type(model, tmp_path, capsys):
    assert main(["convert", str(model), str(tmp_path / "half"), "--dtype", "fp16", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    found, before = load(tmp_path / "half"), load(model)
    assert found.dtype == torch.float16
    assert values["values_by_type"]["float16"] > values["values_by_type"]["float32"] > 0
    assert sum(values["values_by_type"].values()) == sum(
        one.numel() for one in before.decoder.parameters()
    )
    for name, one in before.decoder.named_parameters():
        assert torch.equal(
            found.decoder.get_parameter(name), one.to(found.decoder.get_parameter(name).dtype)
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (model / name).read_bytes()
    assert main(["convert", str(model), str(tmp_path / "same")]) == 0
    for name, one in load(tmp_path / "same").decoder.named_parameters():
        assert torch.equal(one, before.decoder.get_parameter(name))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "x", "--type", "f16"], "--type is for .gguf files"),
        (["MODEL", "x", "--no-tokenizer"], "--no-tokenizer is for .gguf files"),
        (["MODEL", "x", "--dtype", "int8"], "expected one of fp32, bf16, fp16"),
        (["MODEL", "MODEL"], "already holds a checkpoint"),
        (["MODEL.gguf", "x.gguf"], "expected a folder"),
        (["MODEL", "x.gguf", "--dtype", "fp32"], "--dtype is for folders"),
        (["MODEL.gguf", "x", "--type", "f16"], "--type is for .gguf files"),
        (["MODEL.gguf", "x", "--no-tokenizer"], "--no-tokenizer is for .gguf files"),
        (["MODEL", "x.gguf", "--type", "q5_k"], "expected one of f32, f16, bf16, q8_0, q4_0"),
        (["MODEL", "MODEL.gguf"], "ask to overwrite"),
        (["nowhere", "x.gguf"], "no model at"),
        (["nowhere.gguf", "x"], "no model at"),
    ],
)
def test_a_wrong_order_is_one_line(model, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [one.replace("MODEL", str(model)) for one in arguments]
    assert main(["convert", *given]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_stands_for_a_model_everywhere(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a river.")
    commands = [
        ["generate", "--prompt", "Once", "--max-tokens", "4", "--seed", "1", "--json"],
        ["score", str(text), "--json"],
        ["tokenizer", "encode", "Once upon", "--json"],
        ["inspect", "--json"],
        ["plan", "--json"],
    ]
    for name, *rest in commands:
        found = []
        sub = [rest.pop(0)] if name == "tokenizer" else []
        for source in (str(model), f"{model}.gguf"):
            assert main([name, *sub, source, *rest]) == 0, name
            found.append(json.loads(capsys.readouterr().out))
        folder, file = (dict(values) for values in found)
        for values in (folder, file):
            for key in list(values):
                if key in ("model", "tokenizer", "without_effect") or "second" in key:
                    del values[key]
        assert folder.keys() == file.keys()
        for key in ("ids", "prompt_ids", "tokens", "config", "layers", "bits_per_byte", "text"):
            assert folder.get(key) == file.get(key), (name, key)


@pytest.mark.parametrize("command", ["generate", "inspect", "plan", "score", "tokenizer encode"])
def test_a_broken_file_is_one_line(tmp_path, capsys, command):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    more = {"generate": ["--prompt", "x"], "score": [str(path)], "tokenizer encode": ["x"]}
    assert main([*command.split(), str(path), *more.get(command, [])]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "not a sound GGUF file" in printed.err
    assert printed.err.count("\n") == 1
