"""Loss spikes with and without Jamba's inner norms, up a ladder of learning rates.

    python -m benchmarks.loss_spikes [--rates 0.004 0.016 0.064] [--seeds 3] [--steps 200]
        [--recipe recipes/demo.toml] [--set KEY=VALUE] [--out FILE] [--plot FILE]

Trains the same small model, with `inner_norms` and without, at every rate and from every seed, and
counts the runs that diverged, the steps whose loss was a spike by the trainer's own rule, and the
largest value that went into the scan. Without --recipe it is a model of 4 layers on the held-out
sample in tests/data, small enough for a CPU; with --recipe that recipe's, without its checkpoints.

Paper: Jamba §6.4: without the norms, large activations inside the Mamba layers came before spikes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, hardware, write_json
from jamba_lm.errors import RecipeError
from jamba_lm.presets import embedded_model_path
from jamba_lm.training.learner import Learner
from jamba_lm.training.recipe_file import load_recipe

ARMS = {"with inner norms": "true", "without": "false"}
RATES = (0.004, 0.016, 0.064)
# What a model has at its end: the mean loss of so many steps.
LAST_STEPS = 20
WATCH_EVERY = 10

SMALL = """
[model]
vocab_size = 4096
d_model = 64
d_ff = 64
num_layers = 4
num_heads = 2
num_kv_heads = 1
attention_period = 4
attention_offset = 2
num_experts = 4
tie_embeddings = true
aux_loss_coef = 0.01

[data]
train = ["{text}"]
validation = ["{text}"]
tokenizer = "{tokenizer}"
sequence_tokens = 128

[training]
steps = 200
batch_tokens = 1024
dtype = "bf16"

[optimizer]
learning_rate = 0.004

[schedule]
warmup_steps = 20
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run.

    Attributes:
        arm: one of `ARMS`.
        rate: peak learning rate.
        seed: of the initial weights and the order of the text.
        steps: that were taken.
        spikes: the numbers of those whose loss was a spike, the diverged one included.
        diverged: the loss stopped being a number, or ended above that of a guess.
        loss: mean of the last steps; None when it stopped being a number.
        largest: the largest absolute value that the projections before the scan gave.
        losses: of every step.
    """

    arm: str
    rate: float
    seed: int
    steps: int
    spikes: list[int]
    diverged: bool
    loss: float | None
    largest: float
    losses: list[float]


def run(recipe: Path, changes: Sequence[str], arm: str, rate: float, seed: int) -> Trial:
    """Train once, for as long as the loss is a number."""
    settings = [
        *changes,
        f"model.inner_norms={ARMS[arm]}",
        f"optimizer.learning_rate={rate}",
        f"training.seed={seed}",
    ]
    resolved = load_recipe(recipe, settings)
    losses: list[float] = []
    spikes: list[int] = []
    largest = 0.0
    with tempfile.TemporaryDirectory() as cache:
        learner = Learner(resolved, None, Path(cache))
        for step in range(1, resolved.training.steps + 1):
            try:
                record, *seen = learner.step(watch=step % WATCH_EVERY == 0)
            except RecipeError:
                spikes.append(step)
                break
            losses.append(record["loss"])
            if "spike" in record:
                spikes.append(step)
            for one in seen:
                largest = max(largest, _before_scan(one["maxima"]))
    steps = resolved.training.steps
    whole = len(losses) == steps
    loss = statistics.fmean(losses[-LAST_STEPS:]) if whole else None
    diverged = loss is None or loss > math.log(resolved.model.vocab_size)
    return Trial(arm, rate, seed, len(losses), spikes, diverged, loss, largest, losses)


def _before_scan(maxima: Mapping[str, Mapping[str, float]]) -> float:
    return max(
        (
            layer[place]
            for layer in maxima.values()
            for place in ("x_proj", "dt_proj")
            if place in layer
        ),
        default=0.0,
    )


def table(trials: Sequence[Trial]) -> str:
    """Lay the trials out as a Markdown table, seeds of one arm and rate in one row."""
    lines = [
        "| learning rate | | diverged | with spikes | spikes | last loss | largest |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rate in sorted({one.rate for one in trials}):
        for arm in ARMS:
            some = [one for one in trials if (one.rate, one.arm) == (rate, arm)]
            losses = [one.loss for one in some if one.loss is not None]
            middle = f"{statistics.median(losses):.3f}" if losses else "none"
            lines.append(
                f"| {rate:g} | {arm} | {sum(one.diverged for one in some)} of {len(some)} | "
                f"{sum(bool(one.spikes) for one in some)} | "
                f"{sum(len(one.spikes) for one in some)} | {middle} | "
                f"{max(one.largest for one in some):.3g} |"
            )
    return "\n".join(lines)


def draw(trials: Sequence[Trial], path: Path) -> None:
    """Draw the losses of all trials, a panel for each rate."""
    from matplotlib.figure import Figure

    rates = sorted({one.rate for one in trials})
    figure = Figure(figsize=(4 * len(rates), 3.2), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        for arm, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
            some = [one for one in trials if (one.rate, one.arm) == (rate, arm)]
            for number, one in enumerate(some):
                label = arm if number == 0 else None
                steps = range(1, len(one.losses) + 1)
                panel.plot(steps, one.losses, color=colour, linewidth=0.8, label=label)
        panel.set_title(f"learning rate {rate:g}")
        panel.set_xlabel("step")
    panels[0].set_ylabel("loss, nats a token")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print a table; write the JSON and the picture where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm at each rate")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--recipe", type=Path, help="a recipe; a small model when not given")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args()
    changes = [*options.changes, f"training.steps={options.steps}"]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = options.recipe
        if recipe is None:
            recipe = Path(folder) / "small.toml"
            text = ROOT / "tests" / "data" / "held_out.jsonl"
            recipe.write_text(SMALL.format(text=text, tokenizer=embedded_model_path()))
        for rate in options.rates:
            for arm in ARMS:
                for seed in range(1, options.seeds + 1):
                    trials.append(run(recipe, changes, arm, rate, seed))
                    one = trials[-1]
                    print(
                        f"{rate:g} {arm}, seed {seed}: {one.steps} steps, loss {one.loss}, "
                        f"{len(one.spikes)} spikes",
                        file=sys.stderr,
                    )
    print(table(trials))
    if options.plot is not None:
        draw(trials, options.plot)
    record: dict[str, Any] = {"hardware": hardware(), "changes": changes}
    write_json(options.out, {**record, "trials": [_short(one) for one in trials]})


def _short(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "losses": [round(loss, 4) for loss in trial.losses]}


if __name__ == "__main__":
    main()
