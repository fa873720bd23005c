"""A run that is killed, interrupted or out of disk loses nothing that a checkpoint held."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jamba_lm.training.checkpointing import checkpoints
from tests.cli.running import ENVIRONMENT, PROGRAM
from tests.training.tiny_run import log_of, write_tiny_run

STEPS = 24
# A checkpoint after every step, so that kills fall into writing as often as into computing.
CHANGES = [f"training.steps={STEPS}", "checkpoint.every_steps=1", "validation.every_steps=12"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole_run(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    start(recipe_path, folder).communicate(timeout=300)
    return folder


def start(recipe: Path, folder: Path, *, largest_file: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    changes = [part for change in CHANGES for part in ("--set", change)]
    return subprocess.Popen(
        [
            *PROGRAM,
            "train",
            str(recipe),
            "--out",
            str(folder),
            "--auto",
            "--threads",
            "1",
            *changes,
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if largest_file is None else limit,
    )


def steps_done(folder: Path) -> int:
    found = checkpoints(folder / "checkpoints")
    return int(found[-1].stem.partition("-")[2]) if found else 0


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while steps_done(folder) < step and process.poll() is None:
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.001)


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("model/model.safetensors", "model/config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert log_of(folder) == log_of(whole)
    strays = [path.name for path in (folder / "checkpoints").iterdir() if ".tmp" in path.name]
    assert not strays


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param((0, 4, 9, 15), id="4 moments"),
        pytest.param(range(20), id="20 moments", marks=pytest.mark.soak),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(recipe_path, whole_run, tmp_path, moments):
    draw = random.Random(0)
    folder, kills = tmp_path / "killed", 0
    for wanted in moments:
        process = start(recipe_path, folder)
        wait_for_step(folder, wanted, process)
        # Checkpoints of this size take some milliseconds, and so does a step.
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        for path in checkpoints(folder / "checkpoints"):
            assert path.stat().st_size > 0
    assert kills >= 3 / 4 * len(moments)
    process = start(recipe_path, folder)
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    assert f"trained {STEPS} steps" in said
    assert_same(folder, whole_run)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(recipe_path, whole_run, tmp_path):
    folder = tmp_path / "stopped"
    process = start(recipe_path, folder)
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert "--resume" in said, complained
    assert "Traceback" not in complained
    assert 2 <= steps_done(folder) < STEPS
    assert start(recipe_path, folder).communicate(timeout=300)
    assert_same(folder, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("largest_file", [20_000, 1_500])
def test_a_full_disk_is_one_line_and_loses_nothing(recipe_path, whole_run, tmp_path, largest_file):
    """The smaller limit stops the first tokens, the larger one the checkpoint."""
    folder = tmp_path / "full"
    process = start(recipe_path, folder)
    wait_for_step(folder, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = steps_done(folder)

    process = start(recipe_path, folder, largest_file=largest_file)
    _, complained = process.communicate(timeout=300)
    assert process.returncode == 2
    assert complained.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in complained
    assert steps_done(folder) == before

    start(recipe_path, folder).communicate(timeout=300)
    assert_same(folder, whole_run)


@pytest.mark.slow
def test_under_json_stdout_is_one_object(recipe_path, whole_run, tmp_path):
    process = subprocess.run(
        [
            *(*PROGRAM, "train", str(recipe_path), "--out", str(tmp_path / "run")),
            *("--json", "--set", "training.steps=4"),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(process.stdout)
    assert result["finished"] is True
    assert result["steps"] == 4
    assert result["bits_per_byte"] > 0
    assert Path(result["model"], "model.safetensors").is_file()
