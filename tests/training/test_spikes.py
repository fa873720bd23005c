"""A spike is found where there is one, and the run goes on as its recipe says."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import RecipeError
from jamba_lm.training import loop
from jamba_lm.training.learner import Learner
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.spikes import FEWEST, WINDOW, is_spike, remembered
from tests.training.tiny_run import log_of, write_tiny_run

STEPS = ["training.steps=24", "checkpoint.every_steps=4", "watch.spike_threshold=4"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@given(st.lists(st.floats(2.9, 3.1), min_size=FEWEST, max_size=WINDOW))
def test_what_lies_among_the_last_losses_is_no_spike(losses):
    assert not is_spike(sum(losses) / len(losses), losses, 6.0)
    assert is_spike(6.0, losses, 6.0)
    assert is_spike(math.nan, losses, 6.0)


def test_few_losses_tell_nothing():
    assert not is_spike(100.0, [3.0] * (FEWEST - 1), 6.0)
    assert is_spike(100.0, [3.0] * FEWEST, 6.0)


def test_only_the_last_losses_are_remembered():
    losses: tuple[float, ...] = ()
    for number in range(WINDOW + 5):
        losses = remembered(float(number), losses)
    assert losses == tuple(float(number) for number in range(5, WINDOW + 5))


def spoiled(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the loss of `step` come out far too high, the first time that it is taken."""
    own = Learner.gradients

    def gradients(self, batches, **named):
        done = own(self, batches, **named)
        if self.progress.tokens_seen == (step - 1) * 96:
            done.losses["loss"] += 10.0
        return done

    monkeypatch.setattr(Learner, "gradients", gradients)


def test_a_spike_is_noted_and_changes_nothing(recipe_path, tmp_path, monkeypatch):
    spoiled(monkeypatch, 20)
    loop.train(load_recipe(recipe_path, STEPS), tmp_path / "run")
    steps = [one for one in log_of(tmp_path / "run") if one["event"] == "step"]
    assert [one["step"] for one in steps if "spike" in one] == [20]
    assert steps[19]["spike"] == "noted"


def test_a_skipped_spike_leaves_the_weights_and_moves_the_data_on(
    recipe_path, tmp_path, monkeypatch
):
    spoiled(monkeypatch, 20)
    recipe = load_recipe(recipe_path, [*STEPS, "watch.spike=skipped"])
    learner = Learner(recipe, None, tmp_path)
    for _ in range(19):
        learner.step()
    before = {name: x.clone() for name, x in learner.optimizer.tensors().items()}
    position = learner.progress.position
    (record,) = learner.step()
    assert record["spike"] == "skipped"
    assert all(torch.equal(before[name], x) for name, x in learner.optimizer.tensors().items())
    assert learner.progress.position != position
    assert learner.progress.steps_done == 20
    assert len(learner.progress.recent_losses) == 19
    (record,) = learner.step()
    assert "spike" not in record
    assert any(not torch.equal(before[name], x) for name, x in learner.optimizer.tensors().items())


def test_a_rolled_back_spike_returns_to_the_checkpoint_and_reads_on(
    recipe_path, tmp_path, monkeypatch
):
    spoiled(monkeypatch, 19)
    recipe = load_recipe(recipe_path, [*STEPS, "watch.spike=rolled back"])
    outcome = loop.train(recipe, tmp_path / "run")
    assert outcome.finished
    log = log_of(tmp_path / "run")
    (note,) = [one for one in log if one["event"] == "rolled back"]
    assert (note["step"], note["to_step"]) == (19, 16)
    taken = [one["step"] for one in log if one["event"] == "step"]
    assert taken == [*range(1, 20), *range(17, 25)]
    # Three steps were taken twice, each time with other text.
    assert outcome.progress.tokens_seen == (24 + 3) * 96


def test_rolled_back_a_learner_stands_where_it_had_read(recipe_path, tmp_path):
    """Saved at once, it must not read the same text again."""
    learner = Learner(load_recipe(recipe_path, STEPS), None, tmp_path)
    learner.step()
    saved = learner.save(0)
    weights = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    learner.step()
    position = learner.progress.position
    learner.roll_back(replace(saved, tensors=weights))
    assert learner.progress.steps_done == 1
    assert learner.progress.position == position
    assert learner.progress.tokens_seen == 2 * 96
    assert all(torch.equal(weights[name], x) for name, x in learner.optimizer.tensors().items())


def test_a_gradient_that_is_not_finite_ends_the_run_or_is_skipped(
    recipe_path, tmp_path, monkeypatch
):
    own = Learner.gradients

    def gradients(self, batches, **named):
        done = own(self, batches, **named)
        if self.progress.steps_done == 2:
            self.optimizer._waiting[0][0][0] = math.inf
        return done

    monkeypatch.setattr(Learner, "gradients", gradients)
    with pytest.raises(RecipeError, match="diverged at step 3"):
        loop.train(load_recipe(recipe_path), tmp_path / "noted")
    recipe = load_recipe(recipe_path, ["watch.spike=skipped"])
    assert loop.train(recipe, tmp_path / "skipped").finished


def test_spikes_without_end_end_the_run(recipe_path, tmp_path, monkeypatch):
    own = Learner.gradients

    def gradients(self, batches, **named):
        done = own(self, batches, **named)
        if self.progress.steps_done == 5:
            self.optimizer._waiting[0][0][0] = math.inf
        return done

    monkeypatch.setattr(Learner, "gradients", gradients)
    recipe = load_recipe(recipe_path, [*STEPS, "watch.spike=rolled back"])
    with pytest.raises(RecipeError, match="spiked again after 3 returns to step-000000004"):
        loop.train(recipe, tmp_path / "run")


def test_a_resumed_run_decides_alike(recipe_path, tmp_path, monkeypatch):
    """It needs the losses from before it was stopped to know a spike."""
    spoiled(monkeypatch, 20)
    recipe = load_recipe(recipe_path, [*STEPS, "watch.spike=skipped"])
    loop.train(recipe, tmp_path / "whole")

    def stop(record):
        if record["event"] == "step" and record["step"] == 18:
            signal.raise_signal(signal.SIGINT)

    loop.train(recipe, tmp_path / "stopped", report=stop)
    assert loop.train(recipe, tmp_path / "stopped", resume="always").finished
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    assert any("spike" in one for one in log_of(tmp_path / "whole"))
