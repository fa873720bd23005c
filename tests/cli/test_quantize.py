"""`jamba quantize`, and `--quantize` on the commands that open a model."""

from __future__ import annotations

import json

import pytest

from jamba_lm.cli.main import main
from jamba_lm.language_model import load
from tests.arms import SMALL
from tests.checkpoint.folders import WEIGHTS, checkpoint


@pytest.fixture
def plain(tmp_path):
    # Wide enough that no two schemes come to the same.
    return checkpoint(tmp_path / "plain", SMALL.replace(d_model=64, d_ff=64), dtype="bf16")


def refused(capsys, *arguments) -> str:
    assert main([str(one) for one in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_a_folder_is_written_and_described(plain, tmp_path, capsys):
    out = tmp_path / "packed"
    command = ["quantize", str(plain), "--scheme", "int4", "--group", "32", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"] == {
        "quant_method": "jamba_lm",
        "scheme": "int4",
        "group_size": 32,
    }
    assert told["bytes"] == sum(part["num_bytes"] for part in told["parts"])
    assert told["bytes"] == load(out).weight_bytes
    assert told["bytes"] <= (out / WEIGHTS).stat().st_size
    assert main([*command, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "the rest    as it is" in text
    assert f"wrote {told['bytes']:,} bytes of weights" in text


def test_planning_and_inspecting_know_the_folder(plain, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["quantize", str(plain), "--scheme", "int8", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["plan", str(out), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["format"] == "int8"
    assert planned["bytes"]["weights"] == load(out).weight_bytes
    assert main(["plan", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "bf16"
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "int8"
    assert main(["inspect", str(out)]) == 0
    assert f"{load(out).weight_bytes:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["experts-int8", "int8", "experts-int4", "int4", "int4-32"])
def test_a_model_can_be_packed_while_it_is_loaded(plain, scheme, capsys):
    command = ["bench", str(plain), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
    assert main([*command, "--quantize", scheme, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"] == scheme
    assert told["memory"]["weight_bytes"] == load(plain, quantize=scheme).weight_bytes


def test_packed_text_is_the_same_from_folder_and_option(tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["quantize", "demo", "--scheme", "experts-int8", "--out", str(out)]) == 0
    capsys.readouterr()
    question = ["--prompt", "My fellow", "--max-tokens", "6", "--temperature", "0"]
    assert main(["generate", str(out), *question]) == 0
    text = capsys.readouterr().out
    assert main(["generate", "demo", *question, "--quantize", "experts-int8"]) == 0
    assert capsys.readouterr().out == text
    assert text.strip()


def test_wrong_wishes_are_refused_on_one_line(plain, tmp_path, capsys):
    out = tmp_path / "packed"
    wrong = [
        (("--scheme", "int3"), "no quantisation scheme 'int3'"),
        (("--scheme", "int4", "--group", "48"), "the group is 48: expected one of 32, 64"),
        (("--scheme", "int8", "--group", "32"), "a group of 32 was given with scheme 'int8'"),
        (("--scheme", "int8", "--dtype", "fp8"), "unknown dtype 'fp8'"),
        (("--scheme", "int8", "--threads", "0"), "--threads is 0"),
    ]
    for options, message in wrong:
        assert message in refused(capsys, "quantize", plain, "--out", out, *options)
    assert "no model at" in refused(
        capsys, "quantize", tmp_path / "nowhere", "--scheme", "int8", "--out", out
    )
    assert "is the checkpoint to quantise" in refused(
        capsys, "quantize", plain, "--scheme", "int8", "--out", plain, "--overwrite"
    )
    assert "already holds a checkpoint" in refused(
        capsys, "quantize", "demo", "--scheme", "int8", "--out", plain
    )
    assert "no quantisation scheme 'int-4'" in refused(
        capsys, "generate", "demo", "--prompt", "x", "--quantize", "int-4"
    )
    assert not out.exists()


def test_a_gguf_file_is_sent_to_convert(tmp_path, capsys):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    message = refused(capsys, "quantize", file, "--scheme", "int8", "--out", tmp_path / "out")
    assert "`jamba convert`" in message


def test_a_folder_is_rounded_for_a_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Four score and seven years ago our fathers brought forth. " * 40, "utf-8")
    packed = {}
    for name, extra in {"for it": ["--calibrate", str(text)], "plain": []}.items():
        out = tmp_path / name
        command = ["quantize", "demo", "--scheme", "int4", "--out", str(out), "--json", *extra]
        if extra:
            command += ["--calibration-tokens", "300"]
        assert main(command) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["calibration_tokens"] == (300 if extra else 0)
        packed[name] = (told["bytes"], (out / WEIGHTS).read_bytes())
        assert {one.name for one in out.iterdir()} >= {"tokenizer.json", "config.json"}
        assert main(["generate", str(out), "--prompt", "My fellow", "--max-tokens", "3"]) == 0
        assert capsys.readouterr().out.strip()
    assert packed["for it"][0] == packed["plain"][0]
    assert packed["for it"][1] != packed["plain"][1]


def test_a_text_that_cannot_be_used_is_refused(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Some words.", "utf-8")
    command = ["quantize", "demo", "--out", out]
    int4 = [*command, "--scheme", "int4"]
    assert "int8 has no matrix in 4 bits" in refused(
        capsys, *command, "--scheme", "int8", "--calibrate", text
    )
    assert "name it with --calibrate" in refused(capsys, *int4, "--calibration-tokens", "5")
    assert "no text at" in refused(capsys, *int4, "--calibrate", tmp_path / "none.txt")
    text.write_text("", "utf-8")
    assert "holds no text" in refused(capsys, *int4, "--calibrate", text)
    text.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(capsys, *int4, "--calibrate", text)
    assert not out.exists()
    text.write_text("Some words.", "utf-8")
    out.mkdir()
    (out / "mine.txt").write_text("mine", "utf-8")
    refused(capsys, *int4, "--calibrate", text)
    assert [one.name for one in out.iterdir()] == ["mine.txt"]
