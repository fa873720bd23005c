"""The `jamba tokenizer` commands: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import sys

import pytest

from jamba_lm.cli.main import main
from jamba_lm.text.tokenizer import load_tokenizer
from tests.text.folders import SAMPLE, trained_folder

FOLDER = str(trained_folder("byte-level"))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["tokenizer", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample.txt"
    path.write_text(SAMPLE, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_train_writes_a_tokenizer_and_measures_it(capsys, tmp_path, sample, kind):
    arguments = ["--vocab", "600", "--kind", kind, "--special", "<think>", "--json"]
    out = tmp_path / "out"
    status, stdout, stderr = run(
        capsys, "train", str(sample), "--out", str(out), "--held-out", str(sample), *arguments
    )
    assert status == 0
    result = json.loads(stdout)
    assert result["vocab_size"] == load_tokenizer(out).vocab_size == 600
    assert result["held_out"]["digits_split"] == 1.0
    assert result["held_out"]["pieces_changed"] == 0
    assert result["held_out"]["bytes"] == len(SAMPLE.encode())
    assert f"wrote {out}: 600 entries" in stderr


def test_train_says_when_there_is_too_little_to_hold_any_out(capsys, tmp_path, sample):
    status, stdout, stderr = run(
        capsys, "train", str(sample), "--vocab", "600", "--out", str(tmp_path / "out")
    )
    assert status == 0
    assert "600 entries" in stdout
    assert "too little text to keep any out" in stderr


def test_report_measures_text(capsys, sample):
    status, stdout, _ = run(capsys, "report", FOLDER, str(sample), "--json")
    assert status == 0
    result = json.loads(stdout)
    assert result["bytes"] == len(SAMPLE.encode())
    assert result["eos_ids"] == [2]
    status, stdout, _ = run(capsys, "report", FOLDER, str(sample))
    assert "digits that are a token of their own: 100.00 %" in stdout
    assert "bytes per token" in stdout


def test_encode_and_decode_are_each_others_inverse(capsys, monkeypatch):
    text = "Über 12 <|im_end|>\n"
    status, stdout, stderr = run(capsys, "encode", FOLDER, text)
    assert status == 0
    assert stdout.split()[0] == "1"
    assert "<|startoftext|>" in stderr
    assert run(capsys, "decode", FOLDER, *stdout.split())[1] == text + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdout.encode())))
    assert json.loads(run(capsys, "decode", FOLDER, "--json")[1]) == {"text": text}


def test_encode_reads_standard_input_and_makes_control_tokens_on_demand(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a<|im_end|>")))
    status, stdout, _ = run(capsys, "encode", FOLDER, "--special", "--no-bos", "--json")
    assert status == 0
    assert json.loads(stdout)["tokens"] == ["a", "<|im_end|>"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["encode", "/nowhere", "a"], b"", "no tokenizer at '/nowhere'"),
        (["encode", FOLDER], b"a\xff", "standard input is not UTF-8: byte 1 is 0xff"),
        (["decode", FOLDER], b"1 two", "'two' is no token id"),
        (["decode", FOLDER, "--", "-5"], b"", "-5 is no token id"),
        (["report", FOLDER, "/nowhere.txt"], b"", "no text at"),
        (["train", "/nowhere.txt", "--out", "/tmp/never"], b"", "no text at"),
        (["train", "x", "--out", "y", "--vocab", "3"], b"", "a vocabulary of 3 is impossible"),
        (["train", "x", "--out", "y", "--kind", "z"], b"", "no tokenizer kind 'z'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, arguments, stdin, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    status, stdout, stderr = run(capsys, *arguments)
    assert status == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert expected in stderr
    assert stderr.count("\n") == 1
