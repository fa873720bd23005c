"""`jamba plan train` answers without torch, says what it rests on, and refuses bad numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_lm.cli.main import main
from jamba_lm.cli.quantities import parse_run_tokens
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.training import operation_speed
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time everything a few times only, and leave torch's threads as they were."""
    monkeypatch.setattr(operation_speed, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(operation_speed, "OPTIMIZER_SAMPLE", SMALL)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SMALL = JambaConfig(
    vocab_size=64, d_model=16, d_ff=24, num_layers=4, num_heads=2, num_kv_heads=1, num_experts=4
)
HERE = ["--this-machine", "--tokens", "1000000"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_hf()))
    return str(path)


def test_a_plan_of_this_machine_is_measured_here(
    quick: None, small: str, capsys: pytest.CaptureFixture[str]
):
    arguments = [small, *HERE, "--threads", "2"]
    found = answer(capsys, *arguments, "--sequence-tokens", "64", "--batch-tokens", "512")
    assert (found["device"], found["gpus"], found["workers"]) == ("this machine", 1, 2)
    # Eight sequences of 64 for two workers, as many at a time as may be.
    work = found["pass"]
    assert work["sequences"] * work["passes"] * 2 == 8
    origins = {one["origin"] for one in found["assumptions"].values()}
    assert origins == {"measured"}
    assert found["assumptions"]["operations"]["value"] >= 10
    assert found["seconds"]["step"] > 0
    assert found["tokens_per_second"] == pytest.approx(512 / found["seconds"]["step"])
    assert found["exchanges"] == []
    parts = [count for name, count in found["memory"].items() if name != "total"]
    assert sum(parts) == found["memory"]["total"] <= found["gpu_memory"]


def test_a_plan_of_this_machine_says_what_to_write_into_a_recipe(
    quick: None, small: str, capsys: pytest.CaptureFixture[str]
):
    # Without --batch-tokens it is about 8,192, in whole sequences for each of three workers.
    assert main(["plan", "train", small, *HERE, "--threads", "3"]) == 0
    output = capsys.readouterr()
    assert "this machine, 3 workers, of" in output.out
    assert "9,216 a step, in sequences of 512" in output.out
    recipe = re.search(
        r"in a recipe: batch_tokens = (\d+), accumulate = (\d+), workers = 3", output.out
    )
    assert recipe is not None
    assert int(recipe[1]) * int(recipe[2]) == 9216
    assert "mesh" not in output.out
    assert "minutes" in output.out
    assert "measuring" in output.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--gpus", "1"], "--gpus is of other devices"),
        (["--mesh", "shard=1"], "--mesh is of other devices"),
        (["--device", "h100"], "--device is of other devices"),
        (["--threads", "0"], "threads"),
        (["--threads", "3", "--batch-tokens", "2048"], "3 workers cannot share out: take a batch"),
        (["--threads", "1", "--gpu-memory", "1MiB"], "does not fit"),
    ],
)
def test_a_plan_of_this_machine_refuses_what_is_not_of_it(
    quick: None, small: str, capsys: pytest.CaptureFixture[str], more: list[str], said: str
):
    assert main(["plan", "train", small, *HERE, *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_threads_are_of_this_machine(capsys: pytest.CaptureFixture[str]):
    assert "give it with --this-machine" in refused(capsys, *V01, "--threads", "2")


def test_a_sequence_longer_than_any_pass_is_one_pass(capsys: pytest.CaptureFixture[str]):
    found = answer(
        capsys, "tiny", "--tokens", "1B", "--sequence-tokens", "2M", "--gpu-memory", "2000GiB"
    )
    assert found["pass"]["sequences"] == 1
    assert found["pass"]["passes"] == 2


def test_tokens_of_a_run_are_counted_in_thousands():
    assert parse_run_tokens("300B", "--tokens") == 300 * 10**9
    assert parse_run_tokens("123", "--tokens") == 123
    with pytest.raises(InputError, match="such as 300B"):
        parse_run_tokens("1K", "--tokens")
