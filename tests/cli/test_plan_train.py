"""`jamba plan train` answers without torch, says what it rests on, and refuses bad numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from jamba_lm.cli.main import main
from jamba_lm.cli.quantities import parse_run_tokens
from jamba_lm.errors import InputError
from tests.cli.running import ENVIRONMENT

V01 = ["jamba-v0.1", "--gpus", "64", "--tokens", "1T", "--mesh", "shard=64,expert=16"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "train", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", "train", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_a_plan_says_what_fits_how_long_it_takes_and_what_it_rests_on(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["plan", "train", *V01]) == 0
    text = capsys.readouterr().out
    for said in (
        "mesh: shard=64,expert=16 (as asked)",
        "memory of the fullest rank",
        "scan states",
        "waiting: experts",
        "experts: rows there and back, all-to-all",
        "MFU",
        "days",
        "data sheet: NVIDIA",
        "chosen: no cluster was at hand",
    ):
        assert said in text, said


def test_the_json_has_every_number_of_the_text(capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, *V01)
    assert found["mesh"]["expert"] == 16
    parts = [count for name, count in found["memory"].items() if name != "total"]
    assert sum(parts) == found["memory"]["total"] <= 80 * 2**30
    assert found["days"] == pytest.approx(1e12 / found["tokens_per_second"] / 86400)
    assert found["assumptions"]["product_flops"]["origin"] == "data sheet"
    assert {one["purpose"] for one in found["exchanges"]} == {"weights", "gradients", "experts"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jamba-v0.1", "--gpus", "64"], "--tokens"),
        (["jamba-v0.1", "--gpus", "0", "--tokens", "1T"], "expected 1 or more devices"),
        (["jamba-v0.1", "--gpus", "many", "--tokens", "1T"], "--gpus"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "1M"], "such as 300B"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "-1"], "--tokens"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "1T", "--mesh", "shard=x"], "from 1 to"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "1T", "--mesh", "shard=8"], "make them equal"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "1T", "--device", "h1000"], "no device"),
        (["jamba-v0.1", "--gpus", "64", "--tokens", "1T", "--gpu-memory", "80G"], "80GiB"),
        (["jamba-v0.1", "--gpus", "8", "--tokens", "1T"], "does not fit on 8 devices"),
        (["jamba-v9", "--gpus", "8", "--tokens", "1T"], "no model"),
        ([*V01, "--sequence-tokens", "3000"], "not a whole number"),
    ],
)
def test_bad_numbers_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert said in refused(capsys, *arguments)


def test_a_plan_of_a_model_to_run_needs_no_name_of_a_command(capsys: pytest.CaptureFixture[str]):
    for arguments in (["plan", "tiny", "--json"], ["plan", "model", "tiny", "--json"]):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "tiny"


def test_planning_a_run_imports_no_torch():
    code = (
        "import sys\n"
        "from jamba_lm.cli.main import main\n"
        f"main({['plan', 'train', *V01]!r})\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 0


def test_tokens_of_a_run_are_counted_in_thousands():
    assert parse_run_tokens("300B", "--tokens") == 300 * 10**9
    assert parse_run_tokens("123", "--tokens") == 123
    with pytest.raises(InputError, match="such as 300B"):
        parse_run_tokens("1K", "--tokens")
