"""`jamba score` says how well a text is predicted."""

from __future__ import annotations

import json

import pytest

from jamba_lm.cli.main import main
from jamba_lm.evaluation.scoring import score_file
from jamba_lm.language_model import load
from jamba_lm.text.tokenizer import load_tokenizer
from tests.tiny_checkpoint import TINY_TEXT


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TINY_TEXT.encode())
    return path


def test_the_score_is_printed(capsys, tiny_checkpoint, text):
    assert main(["score", str(tiny_checkpoint), str(text), "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    score = score_file(load(tiny_checkpoint), load_tokenizer(tiny_checkpoint), text)
    assert values["bits_per_byte"] == score.bits_per_byte
    assert values["loss"] == score.loss
    assert values["bytes"] == len(TINY_TEXT.encode())
    assert f"{score.bits_per_byte:.4f} bits per byte" in printed.err
    assert main(["score", str(tiny_checkpoint), str(text)]) == 0
    assert f"{score.bits_per_byte:.4f} bits per byte" in capsys.readouterr().out


def test_windows_are_told(capsys, tiny_checkpoint, text):
    command = ["score", str(tiny_checkpoint), str(text), "--context-tokens", "50"]
    assert main([*command, "--piece-tokens", "7"]) == 0
    assert "windows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "is empty"), (b"a\xff", "not UTF-8: byte 1 is 0xff")]
)
def test_what_is_no_text_is_refused_before_the_model_is_loaded(capsys, tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    assert main(["score", "no-such-model", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
