"""Several processes train the model that one would, and lose nothing when one of them dies."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_lm.__main__ import main
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.tensor_file import TensorFile
from jamba_lm.training.checkpointing import checkpoints, read_checkpoint
from tests.tolerances import DISTRIBUTED
from tests.training.ranks import Ended, RankServer, wait_for
from tests.training.tiny_run import log_of, write_tiny_run

pytestmark = pytest.mark.distributed

PASSES = 4
# Every loss there is, experts balanced over the step, layers computed again.
CHANGES = (
    "training.dtype=fp32",
    "training.steps=8",
    "training.recompute_layers=true",
    # So that a run may be made longer without having gone another way from the start.
    "schedule.kind=warmup-stable-decay",
    "loss.balance_over=step",
    "loss.activation_coef=0.001",
    "loss.z_coef=0.001",
    "watch.every_steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
)


def changed(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def on_mesh(**axes: int) -> list[str]:
    """Return the changes that share the passes of a step out over so many processes."""
    readers = axes.get("replicate", 1) * axes.get("shard", 1)
    mesh = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    return changed(f"training.accumulate={PASSES // readers}", *mesh)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    server = RankServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def alone(recipe: Path, server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    arguments = ["train", str(recipe), "--out", str(folder), *changed(*CHANGES)]
    assert main([*arguments, *on_mesh()]) == 0
    return folder


@pytest.fixture(scope="module")
def two(recipe: Path, server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that hold a half of the weights each."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    ended = server.run(2, "train", recipe, "--out", folder, *changed(*CHANGES), *on_mesh(shard=2))
    assert ended.statuses == [0, 0], ended.said
    return folder


def assert_close(found: Any, expected: Any, what: str = "") -> None:
    """Compare the numbers of two logs."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key in expected:
            assert_close(found[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), what
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{what}.{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=DISTRIBUTED["loss"]), what
    else:
        assert found == expected, what


def assert_same_training(found: Path, expected: Path) -> None:
    """Hold two runs to the same log and the same weights, to the rounding of their sums."""
    for one, other in zip(log_of(found), log_of(expected), strict=True):
        assert_close(one, other)
    with (
        TensorFile(found / "model/model.safetensors") as ours,
        TensorFile(expected / "model/model.safetensors") as theirs,
    ):
        assert ours.names == theirs.names
        for name in ours.names:
            one, other = ours.tensor(name), theirs.tensor(name)
            distance = torch.linalg.vector_norm(one - other)
            assert distance <= DISTRIBUTED["weight"] * torch.linalg.vector_norm(other), name


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Hold two checkpoints to the same bits."""
    one, other = read_checkpoint(found).tensors, read_checkpoint(expected).tensors
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def num_values(path: Path) -> int:
    with TensorFile(path) as file:
        return sum(math.prod(file.shape(name)) for name in file.names)


def newest(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def until(run: Path, step: int, to: Path) -> Path:
    """Copy a run as it was when it was saved after a step."""
    shutil.copytree(run, to)
    for path in checkpoints(to / "checkpoints"):
        if int(path.name[5:14]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert newest(to).name.startswith(f"step-{step:09d}")
    return to


def last_line(ended: Ended, rank: int = 0) -> str:
    return ended.said[rank].strip().splitlines()[-1]


def test_two_processes_train_what_one_does(alone, two):
    assert_same_training(two, alone)
    saved, own = newest(two), newest(alone)
    assert saved.is_dir()
    assert own.is_file()
    assert {path.name for path in saved.iterdir()} == {
        "index.json",
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
    }
    # Weights and both moments of a half of the model each, and nothing twice.
    parts, (whole,) = [num_values(path) for path in saved.glob("part-*")], [num_values(own)]
    assert sum(parts) == whole
    assert max(parts) < 0.6 * whole


def test_only_the_first_process_speaks(recipe, server, tmp_path):
    ended = server.run(
        2, "train", recipe, "--out", tmp_path / "run", "--json", *on_mesh(shard=2),
        *changed("training.steps=4"),
    )  # fmt: skip
    assert ended.statuses == [0, 0]
    assert ended.said[1] == ""
    result = json.loads(ended.said[0][ended.said[0].index("{\n") :])
    assert result["finished"] is True
    assert result["tokens"] == 4 * PASSES * 48


def resume(
    server: RankServer, recipe: Path, run: Path, mesh: dict[str, int], *changes: str
) -> Ended:
    return server.run(
        ParallelLayout(**mesh).world_size,
        *("train", recipe, "--out", run, "--resume", *changed(*CHANGES, *changes)),
        *on_mesh(**mesh),
    )


def test_a_run_goes_on_on_other_meshes(recipe, server, alone, tmp_path):
    """From one process to four that read, to four that read one batch, and back to one."""
    run = until(alone, 2, tmp_path / "run")
    meshes = ({"replicate": 2, "shard": 2, "expert": 2}, {"context": 2, "tensor": 2})
    for mesh, steps in zip(meshes, (4, 6), strict=True):
        ended = resume(server, recipe, run, mesh, f"training.steps={steps}")
        assert set(ended.statuses) == {0}, ended.said
        assert newest(run).is_dir()
    arguments = ["train", str(recipe), "--out", str(run), "--resume", *changed(*CHANGES)]
    assert main([*arguments, *on_mesh()]) == 0
    # Each part of the run ended with a validation, which a whole one has none of.
    ours, theirs = (
        [one for one in log_of(folder) if one["event"] in ("step", "watch")]
        for folder in (run, alone)
    )
    assert [one["step"] for one in ours if "maxima" in one] == [4, 8]
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_saved_again_by_other_processes_it_holds_the_same_bits(
    recipe, server, alone, two, tmp_path
):
    """Nothing is left to train: what was read is written as it is."""
    for original, mesh in ((alone, {"shard": 2, "tensor": 2}), (two, {})):
        run = until(original, 8, tmp_path / original.name)
        for path in checkpoints(run / "checkpoints")[:-1]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = newest(run).is_dir()
        assert set(resume(server, recipe, run, mesh).statuses) == {0}
        assert newest(run).is_dir() is not before
        assert_same_tensors(newest(run), newest(original))


def test_a_model_is_exported_from_any_mesh(two, tmp_path, capsys):
    assert main(["train", "export", str(two), "--out", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "model"), "step": 8}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (two / "model" / name).read_bytes()
    assert main(["train", "export", str(tmp_path), "--out", str(tmp_path / "none")]) == 2


def test_killed_it_ends_at_once_and_goes_on(recipe, server, two, tmp_path):
    """First the process that only works, then the one that writes."""
    run = tmp_path / "run"
    arguments = ["train", recipe, "--out", run, "--auto", *changed(*CHANGES), *on_mesh(shard=2)]
    for rank, step in ((1, 2), (0, 4)):
        server.begin(2, *arguments)
        wait_for(run, f"checkpoints/step-{step:09d}")
        server.kill(rank)
        at = time.monotonic()
        ended = server.end()
        assert time.monotonic() - at < 60
        assert ended.statuses[rank] == -signal.SIGKILL
        assert ended.statuses[1 - rank] == 2, ended.said
        assert "lost the others" in last_line(ended, 1 - rank)
        assert "Traceback" not in ended.said[1 - rank]
    ended = server.run(2, *arguments)
    assert ended.statuses == [0, 0], ended.said
    assert_same_training(run, two)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_asked_to_stop_all_save_together(recipe, server, two, tmp_path):
    """Only one process hears it, and it hears it twice, as from torchrun and the terminal."""
    run = tmp_path / "run"
    arguments = [
        "train", recipe, "--out", run, "--auto", *changed(*CHANGES, "checkpoint.every_steps=1"),
        *on_mesh(shard=2),
    ]  # fmt: skip
    server.begin(2, *arguments)
    wait_for(run, "checkpoints/step-000000001")
    for _ in range(2):
        server.kill(1, signal.SIGTERM)
        time.sleep(0.01)
    ended = server.end()
    assert ended.statuses == [0, 0], ended.said
    assert "stopped and saved after step" in last_line(ended)
    step = int(newest(run).name[5:14])
    assert step < 8
    assert log_of(run)[-1]["step"] == step
    assert server.run(2, *arguments).statuses == [0, 0]
    assert_same_training(run, two)


def test_a_full_disk_in_one_process_is_one_line_and_loses_nothing(recipe, server, two, tmp_path):
    run = until(two, 4, tmp_path / "run")
    arguments = ["train", recipe, "--out", run, "--auto", *changed(*CHANGES), *on_mesh(shard=2)]
    ended = server.run(2, *arguments, largest_file={1: 20_000})
    assert ended.statuses == [2, 2], ended.said
    assert last_line(ended).startswith("error: process 1 of 2: cannot write")
    assert "File too large" in last_line(ended)
    assert ended.said[1] == ""
    assert newest(run).name == "step-000000004"
    assert_same_tensors(newest(run), two / "checkpoints/step-000000004")
    assert server.run(2, *arguments).statuses == [0, 0]
    assert_same_training(run, two)


def test_what_does_not_fit_is_refused_by_the_first_process(recipe, server, two, tmp_path):
    def refusal(*changes: str, run: Path = tmp_path / "new", count: int = 2) -> str:
        ended = server.run(
            count, "train", recipe, "--out", run, "--auto", *changed(*CHANGES, *changes)
        )
        assert ended.statuses == [2] * count, ended.said
        assert set(ended.said[1:]) == {""}
        assert ended.said[0].startswith("error: ")
        return last_line(ended)

    assert "= 1 processes and 2 were started" in refusal()
    assert "= 4 processes and 2 were started" in refusal("parallel.shard=4")
    assert "did you mean 'shard'" in refusal("parallel.shards=2")
    assert "training.workers is 2" in refusal("parallel.shard=2", "training.workers=2")
    share = ("parallel.shard=2", "training.accumulate=2")
    assert "a step would be 8 passes" in refusal(
        "parallel.shard=2", "training.accumulate=4", run=two
    )
    assert "model.d_ff is 32" in refusal(*share, "model.d_ff=32", run=two)

    run = until(two, 2, tmp_path / "damaged")
    part = newest(run) / "part-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    assert "was written with" in refusal(*share, run=run)
    part.unlink()
    assert "is missing, one of 2 parts" in refusal(*share, run=run)

    text = Path(json.loads((two / "run.json").read_text()).get("corpus", recipe.parent))
    lines = (text / "train.jsonl").read_text()
    (text / "train.jsonl").write_text(lines + '\n{"text": "more"}')
    assert "is not what this run was reading" in refusal(*share, run=two)
    (text / "train.jsonl").write_text(lines)
    assert newest(two).name == "step-000000008"


def test_one_process_refuses_a_recipe_for_several(recipe, tmp_path, capsys):
    arguments = [
        "train",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
        *on_mesh(replicate=2, shard=2),
    ]
    assert main(arguments) == 2
    assert "= 4 processes and 1 were started" in capsys.readouterr().err
