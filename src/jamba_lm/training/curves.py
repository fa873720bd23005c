"""The logs of runs as curves, and as the few numbers that compare them.

Knows log files, and nothing of how a run is carried out. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.errors import InputError

LOG = "log.jsonl"
# A step's loss is noisy: the curve is a mean with this much of what it was before.
SMOOTHING = 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """What the log of a run says.

    Attributes:
        name: of its folder.
        steps: records of its steps, in the order they count: what was taken again after a return
            to a checkpoint is there once.
        validations: records of the readings of its held-out documents.
    """

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Read the log of the run in `folder`.

    Raises:
        InputError: there is none, it is not a log, or it holds no step.
    """
    path = folder / LOG
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise InputError(
            f"no log of a run at {str(path)!r}: name a folder that `jamba train` wrote"
        ) from cause
    events: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            event, step = str(record["event"]), int(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as cause:
            if number == len(lines):
                break  # a run that is being written, or was killed while it wrote
            raise InputError(f"line {number} of {str(path)!r} is not a record of a run") from cause
        if event == "rolled back":
            for records in events.values():
                for late in [one for one in records if one > int(record["to_step"])]:
                    del records[late]
        if event in events:
            events[event][step] = record
    if not events["step"]:
        raise InputError(f"{str(path)!r} holds no step yet: wait for the first one")
    steps, validations = (list(records.values()) for records in events.values())
    return Run(folder.resolve().name, steps, validations)


def summary(run: Run) -> dict[str, Any]:
    """Return the last numbers of a run."""
    last, validation = run.steps[-1], run.validations[-1] if run.validations else {}
    return {
        "run": run.name,
        "steps": last["step"],
        "tokens": last["tokens_seen"],
        "loss": smoothed([one["loss"] for one in run.steps])[-1],
        "bits_per_byte": validation.get("bits_per_byte"),
        "spikes": sum("spike" in one for one in run.steps),
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running mean of `values`, without a bias towards the first one."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw loss, held-out bits per byte, gradient norm and balance over tokens as a picture.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as cause:
        raise InputError(
            "curves need matplotlib, which is not installed: pip install 'jamba-lm[plot]'"
        ) from cause
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels: list[tuple[str, str, Callable[[Sequence[float]], Sequence[float]]]] = [
        ("loss, nats a token", "loss", smoothed),
        ("held-out bits per byte", "bits_per_byte", list),
        ("gradient norm", "gradient_norm", smoothed),
        ("balance loss", "balance_loss", smoothed),
    ]
    for axis, (title, key, shape) in zip(axes.flat, panels, strict=True):
        axis.set_title(title)
        axis.set_xlabel("tokens")
        for run in runs:
            axis.plot(*_points(run, key, shape), label=run.name, linewidth=1.2)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as cause:
        raise InputError(f"cannot write the picture {str(path)!r}: {cause}") from cause
    finally:
        pyplot.close(figure)


def _points(
    run: Run, key: str, shape: Callable[[Sequence[float]], Sequence[float]]
) -> tuple[list[int], Sequence[float]]:
    tokens = {one["step"]: one["tokens_seen"] for one in run.steps}
    records = run.validations if key == "bits_per_byte" else run.steps
    found = [one for one in records if key in one and one["step"] in tokens]
    return [tokens[one["step"]] for one in found], shape([one[key] for one in found])
