"""What a training run does, leaves behind, and refuses."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

import jamba_lm
from jamba_lm.errors import (
    BackendUnavailable,
    CheckpointError,
    DataError,
    InputError,
    JambaError,
    RecipeError,
)
from jamba_lm.training import loop
from jamba_lm.training.checkpointing import checkpoints, read_checkpoint
from jamba_lm.training.learner import Learner
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.run_folder import only_run_in
from tests.training.tiny_run import log_of, write_tiny_run


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole_run(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    outcome = loop.train(load_recipe(recipe_path), folder)
    assert outcome.finished
    return folder


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[dict[str, object]]:
    return [record for record in log_of(folder) if record["event"] == "step"]


def test_the_loss_falls_and_is_logged_apart_from_the_balance(whole_run):
    steps = steps_of(whole_run)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    # An untrained model knows nothing: its loss is that of a guess among 400 tokens.
    assert steps[0]["loss"] == pytest.approx(math.log(400), abs=0.2)
    # The balance loss has its minimum, K = 2, at perfect balance, and no coefficient in it.
    assert all(2.0 - 1e-3 <= record["balance_loss"] < 4.0 for record in steps)
    assert steps[-1]["tokens_seen"] == 12 * 2 * 48


def test_validation_is_logged_in_bits_per_byte(whole_run):
    found = [record for record in log_of(whole_run) if record["event"] == "validation"]
    assert [record["step"] for record in found] == [5, 10, 12]
    last = found[-1]
    bits = last["loss"] * last["num_tokens"] / math.log(2) / last["num_bytes"]
    assert last["bits_per_byte"] == pytest.approx(bits)


def test_the_exported_model_is_the_one_that_was_validated(whole_run, recipe):
    model = jamba_lm.load(whole_run / "model")
    tokenizer = jamba_lm.load_tokenizer(whole_run / "model")
    assert model.dtype == torch.bfloat16
    text = json.loads(Path(recipe.data.validation[0]).read_text())["text"]
    ids = [*tokenizer.encode(text, add_bos=False), tokenizer.eos_ids[0]]
    nats, piece = 0.0, recipe.data.sequence_tokens - 1
    for first in range(0, len(ids), piece):
        targets = torch.tensor(ids[first : first + piece])
        (logits,) = model.logits([[tokenizer.bos_id, *targets[:-1].tolist()]])
        nats -= logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    logged = [record for record in log_of(whole_run) if record["event"] == "validation"][-1]
    bits = nats / math.log(2) / len(text.encode())
    assert bits == pytest.approx(logged["bits_per_byte"], rel=0.02)


def test_what_it_was_run_with_is_beside_it(whole_run, recipe):
    assert load_recipe(whole_run / "recipe.toml") == recipe
    record = json.loads((whole_run / "run.json").read_text())
    assert record["seed"] == 7
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["backends"]) == {"causal_conv", "selective_scan", "attention"}
    assert record["threads"] == torch.get_num_threads()
    assert "commit" in record


def test_two_checkpoints_are_kept_and_no_temporary_file(whole_run):
    names = [path.name for path in checkpoints(whole_run / "checkpoints")]
    assert names == ["step-000000010.safetensors", "step-000000012.safetensors"]
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == names


def test_a_second_run_has_the_same_bits(whole_run, recipe, tmp_path):
    loop.train(recipe, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(whole_run)
    assert log_of(tmp_path / "again") == log_of(whole_run)


def test_workers_change_the_speed_and_nothing_else(whole_run, recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, ["training.workers=2"])
    threads = torch.get_num_threads()
    try:
        loop.train(recipe, tmp_path / "workers")
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "workers") == weights(whole_run)
    assert log_of(tmp_path / "workers") == log_of(whole_run)


def test_another_seed_gives_another_model(whole_run, recipe_path, tmp_path):
    loop.train(load_recipe(recipe_path, ["training.seed=8"]), tmp_path / "other")
    assert weights(tmp_path / "other") != weights(whole_run)


def test_float32_training_starts_from_the_same_loss(whole_run, recipe_path, tmp_path):
    loop.train(load_recipe(recipe_path, ["training.dtype=fp32"]), tmp_path / "wide")
    assert jamba_lm.load(tmp_path / "wide" / "model").dtype == torch.float32
    wide, narrow = steps_of(tmp_path / "wide"), steps_of(whole_run)
    assert wide[0]["loss"] == pytest.approx(narrow[0]["loss"], rel=1e-3)


def test_passes_are_summed_into_the_gradient_of_one_large_batch(recipe_path, tmp_path):
    """One pass of 48 tokens or two of 24 see the same loss before the first step."""
    common = ["training.steps=1", "schedule.warmup_steps=0", "training.dtype=fp32"]
    whole = load_recipe(recipe_path, [*common, "training.batch_tokens=48", "training.accumulate=1"])
    parts = load_recipe(recipe_path, [*common, "training.batch_tokens=24", "training.accumulate=2"])
    found = []
    for name, one in (("whole", whole), ("parts", parts)):
        learner = Learner(one, None, tmp_path)
        (record,) = learner.step()
        assert record["tokens_seen"] == 48, name
        found.append(record)
    assert found[0]["gradient_norm"] == pytest.approx(found[1]["gradient_norm"], rel=0.3)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.02)


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_stopped_and_resumed_it_has_the_same_bits(whole_run, recipe, tmp_path, stop_after):
    def stop(record):
        if record["event"] == "step" and record["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "stopped"
    before = signal.getsignal(signal.SIGINT)
    outcome = loop.train(recipe, folder, report=stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert not outcome.finished
    assert outcome.progress.steps_done == stop_after
    assert checkpoints(folder / "checkpoints")[-1].name == f"step-{stop_after:09d}.safetensors"
    assert loop.train(recipe, folder, resume="always").finished
    assert weights(folder) == weights(whole_run)
    assert log_of(folder) == log_of(whole_run)


def test_a_finished_run_is_finished_again_without_a_step(whole_run, recipe, tmp_path):
    before = weights(whole_run), log_of(whole_run)
    outcome = loop.train(recipe, whole_run, resume="auto")
    assert outcome.finished
    assert outcome.validation is not None
    assert (weights(whole_run), log_of(whole_run)) == before


def test_a_run_can_be_made_longer(recipe_path, tmp_path):
    changes = ["schedule.kind=warmup-stable-decay", "schedule.decay_steps=2", "training.steps=6"]
    folder = tmp_path / "run"
    short = load_recipe(recipe_path, changes)
    loop.train(short, folder)
    longer = load_recipe(recipe_path, [*changes, "training.steps=8"])
    assert loop.train(longer, folder, resume="always").progress.steps_done == 8
    (note,) = [record for record in log_of(folder) if record["event"] == "changed"]
    assert note["keys"] == ["training.steps"]


def test_resuming_and_starting_are_not_confused(whole_run, recipe, tmp_path):
    with pytest.raises(InputError, match="already holds a run"):
        loop.train(recipe, whole_run)
    with pytest.raises(InputError, match="no run to resume"):
        loop.train(recipe, tmp_path / "empty", resume="always")


def test_another_recipe_does_not_resume_a_run(whole_run, recipe_path):
    other = load_recipe(recipe_path, ["model.d_ff=32"])
    with pytest.raises(RecipeError, match=r"model\.d_ff is 32, but the run to resume has 16"):
        loop.train(other, whole_run, resume="always")


def test_other_text_does_not_resume_a_run(recipe, recipe_path, tmp_path):
    folder = tmp_path / "run"
    short = load_recipe(recipe_path, ["training.steps=4"])
    loop.train(short, folder)
    train = Path(recipe.data.train[0])
    before = train.read_text()
    try:
        train.write_text(before + '\n{"text": "more"}')
        with pytest.raises(DataError, match="not what this run was reading"):
            loop.train(recipe, folder, resume="always")
    finally:
        train.write_text(before)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_checkpoint_is_one_error(recipe_path, tmp_path, damage):
    recipe = load_recipe(recipe_path, ["training.steps=4"])
    loop.train(recipe, tmp_path)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        newest.write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        loop.train(recipe, tmp_path, resume="auto")
    assert "\n" not in str(caught.value)


def test_a_log_that_was_cut_is_noticed(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, ["training.steps=4"])
    loop.train(recipe, tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="was the log cut"):
        loop.train(recipe, tmp_path, resume="auto")


def test_divergence_ends_the_run_and_says_what_to_do(recipe_path, tmp_path):
    recipe = load_recipe(
        recipe_path,
        ["optimizer.learning_rate=100", "optimizer.clip_norm=1e9", "training.steps=200"],
    )
    with pytest.raises(RecipeError, match=r"diverged at step \d+.*learning_rate"):
        loop.train(recipe, tmp_path)
    for path in checkpoints(tmp_path / "checkpoints"):
        assert all(
            torch.isfinite(tensor).all() for tensor in read_checkpoint(path).tensors.values()
        )


def test_a_tokenizer_larger_than_the_model_is_refused(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path, ["model.vocab_size=300"])
    with pytest.raises(RecipeError, match="vocab_size of 300"):
        loop.train(recipe, tmp_path)


def test_a_back_end_is_obeyed_or_refused(recipe, tmp_path):
    with pytest.raises(BackendUnavailable, match="no backend 'gpu9'"):
        loop.train(recipe, tmp_path, backend="gpu9")


def _hold(folder: str, taken: multiprocessing.synchronize.Event) -> None:
    with only_run_in(Path(folder)):
        taken.set()
        signal.pause()


def test_two_processes_do_not_train_into_one_folder(recipe, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    taken = spawn.Event()
    other = spawn.Process(target=_hold, args=(str(tmp_path), taken))
    other.start()
    try:
        assert taken.wait(120)
        with pytest.raises(InputError, match="another process is training"):
            loop.train(recipe, tmp_path)
    finally:
        other.kill()
        other.join()
    assert loop.train(recipe, tmp_path).finished


def test_errors_of_a_run_are_ours(recipe_path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JambaError):
        loop.train(load_recipe(recipe_path), tmp_path / "file")
