"""`jamba convert`, and every command that takes a GGUF file where it takes a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jamba_lm.cli.main import main
from tests.tiny_checkpoint import write_tiny_checkpoint


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "x"], "expected a file name that ends in .gguf"),
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
