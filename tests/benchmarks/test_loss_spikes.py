"""The study of loss spikes: what it counts, on runs of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loss_spikes import Trial, draw, run, table
from tests.training.tiny_run import write_tiny_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("arm", ["with inner norms", "without"])
def test_a_run_that_learns_has_neither_diverged_nor_spiked(recipe: Path, arm: str):
    trial = run(recipe, [], arm, 0.01, seed=3)
    assert trial.steps == len(trial.losses) == 12
    assert not trial.diverged
    assert trial.spikes == []
    assert trial.loss is not None
    assert trial.losses[-1] < trial.losses[0]
    # What goes into the scan was looked at on the way.
    assert 0.0 < trial.largest < 1e3


def test_a_rate_far_too_high_is_a_run_that_diverged(recipe: Path):
    trial = run(recipe, ["schedule.warmup_steps=0"], "without", 50.0, seed=3)
    assert trial.diverged


def test_seeds_are_counted_together():
    common = {"rate": 0.5, "steps": 2, "losses": [3.0, 2.0]}
    trials = [
        Trial("without", seed=1, spikes=[2], diverged=False, loss=2.0, largest=7.0, **common),
        Trial("without", seed=2, spikes=[1, 2], diverged=True, loss=None, largest=9.5, **common),
        Trial("with inner norms", seed=1, spikes=[], diverged=False, loss=1.5, largest=2, **common),
    ]
    rows = table(trials).splitlines()[2:]
    assert rows == [
        "| 0.5 | with inner norms | 0 of 1 | 0 | 0 | 1.500 | 2 |",
        "| 0.5 | without | 1 of 2 | 2 | 3 | 2.000 | 9.5 |",
    ]


def test_the_picture_has_a_panel_for_each_rate(tmp_path: Path):
    common = {"seed": 1, "steps": 2, "spikes": [], "diverged": False, "loss": 2.0, "largest": 1.0}
    trials = [
        Trial(arm, rate, losses=[3.0, 2.0], **common)
        for arm in ("with inner norms", "without")
        for rate in (0.1, 0.2)
    ]
    draw(trials, tmp_path / "spikes.png")
    assert (tmp_path / "spikes.png").read_bytes().startswith(b"\x89PNG")
