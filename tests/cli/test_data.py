"""The `jamba data` commands: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jamba_lm.cli.main import main
from tests.corpus.corpora import sentence_text, write_jsonl


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["data", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    write_jsonl(folder / "a.jsonl", [*map(sentence_text, range(6)), sentence_text(0)])
    (folder / "b.txt").write_text(sentence_text(10))
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


def test_a_folder_of_texts_becomes_a_corpus(capsys, texts, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = run(capsys, "prepare", str(texts), "--out", str(out))
    assert status == 0, stderr
    assert "text: 6 documents" in stdout
    assert "exact duplicates: 1 of 8 dropped (within the source 1)" in stdout
    assert "read: 1 of 9 dropped (binary 1)" in stdout
    assert f"{out}/report.html" in stdout
    status, again, stderr = run(capsys, "prepare", str(texts), "--out", str(out))
    assert status == 0
    assert again == stdout
    assert "prepared before" in stderr


def test_json_is_one_object_on_stdout(capsys, texts, tmp_path):
    out = str(tmp_path / "out")
    status, stdout, _ = run(capsys, "prepare", str(texts), "--out", out, "--json")
    assert status == 0
    prepared = json.loads(stdout)
    status, stdout, stderr = run(capsys, "inspect", out, "--json", "--verify")
    assert status == 0
    assert json.loads(stdout) == prepared
    assert prepared["finished"]
    assert prepared["total"]["train"]["documents"] == 6
    assert prepared["sources"][0]["stages"][0]["dropped"] == {"binary": 1}
    assert "bytes are what was written" in stderr


def test_values_of_the_recipe_are_changed_from_the_command_line(capsys, texts, tmp_path):
    out = str(tmp_path / "out")
    status, stdout, stderr = run(
        capsys, "prepare", str(texts), "--out", out, "--set", "duplicates.exact=false",
        "--set", "duplicates.near=false",
    )  # fmt: skip
    assert status == 0, stderr
    assert "7 documents" in stdout
    assert "duplicates" not in stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["prepare", "missing.toml", "--out", "o"], "no recipe at 'missing.toml'"),
        (["prepare", "TEXTS", "--out", "o", "--set", "splt.validation=0"], "did you mean 'split'"),
        (["prepare", "TEXTS"], "Missing option '--out'"),
        (["inspect", "TEXTS"], "no corpus in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_two(
    capsys, texts, tmp_path, monkeypatch, arguments, word
):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run(
        capsys, *(str(texts) if argument == "TEXTS" else argument for argument in arguments)
    )
    assert status == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert word in stderr
