"""`jamba init` writes a checkpoint that loads, or says in one line why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jamba_lm.cli.main import main
from jamba_lm.language_model import load

SMALL = ["--set", "vocab_size=64", "--set", "d_model=32", "--set", "d_ff=8"]


def test_a_checkpoint_of_any_shape_is_written_and_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "x")
    assert main(["init", "tiny", *SMALL, "--out", out, "--dtype", "fp16", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    model = load(out)
    parameters = sum(p.numel() for p in model.decoder.parameters())
    assert f"wrote {parameters:,} parameters" in printed
    assert (model.config.vocab_size, model.config.d_ff, model.config.num_experts) == (64, 8, 4)
    assert str(model.dtype) == "torch.float16"
    assert model.logits([[1, 2, 3]])[0].shape == (3, 64)


def test_json_is_one_object_and_all_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "x")
    assert main(["init", "tiny", *SMALL, "--out", out, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["folder"] == out
    assert values["config"]["d_ff"] == 8
    assert values["bytes"] > 2 * values["parameters"]


def test_a_config_file_may_stand_for_a_preset(tmp_path: Path):
    assert main(["init", "tiny", *SMALL, "--out", str(tmp_path / "one")]) == 0
    again = ["init", str(tmp_path / "one"), "--set", "d_ff=12", "--out", str(tmp_path / "two")]
    assert main(again) == 0
    config = load(tmp_path / "one").config
    assert load(tmp_path / "two").config == config.replace(d_ff=12)


def test_overwriting_must_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["init", "tiny", *SMALL, "--out", str(tmp_path / "x")]
    assert main(command) == 0
    assert main(command) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seed", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tinny"], "no preset 'tinny'"),
        (["tiny", "--set", "d_f=3"], "did you mean 'd_ff'?"),
        (["tiny", "--set", "d_ff"], "expected NAME=VALUE"),
        (["tiny", "--dtype", "int8"], "expected one of fp32, bf16, fp16"),
        (["tiny", "--shard-bytes", "0"], "shard_bytes is 0"),
        (["./nowhere"], "model configuration"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    assert main(["init", *arguments, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert reason in said.err
    assert list(tmp_path.iterdir()) == []
