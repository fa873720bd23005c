"""The page that plans Jamba v0.1 on 64 to 4,096 H100s, written from what `jamba plan train` says.

    python -m benchmarks.plan_table --out docs/results/plan_train.md [--measured FILE]

Every number of the page comes from here; with --measured, the record of `benchmarks.training_plan`
is laid out beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jamba_lm.analysis.memory import GIB, parameter_counts
from jamba_lm.analysis.training_cost.devices import DEVICES
from jamba_lm.analysis.training_cost.mesh import describe
from jamba_lm.analysis.training_cost.plan import Run, TrainingPlan, search, token_flops
from jamba_lm.config import JambaConfig

TOKENS = 10**12
MEMORY = 80 * GIB
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
BATCH = 2**23
LONG, LONG_SIZES = 2**18, (256, 1024, 4096)


def plan(gpus: int, sequence_tokens: int) -> TrainingPlan:
    """Return the fastest plan that the search finds."""
    return search(
        Run(
            config=JambaConfig(),
            device=DEVICES["h100"],
            gpus=gpus,
            gpu_memory=MEMORY,
            tokens=TOKENS,
            batch_tokens=BATCH,
            sequence_tokens=sequence_tokens,
        )
    )


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def plan_rows(plans: Sequence[TrainingPlan]) -> Iterator[list[str]]:
    """Yield a row of each plan."""
    for one in plans:
        work, time = one.rank.work, one.time
        again = "again" if work.recompute else "kept"
        yield [
            f"{one.run.gpus:,}",
            f"`{describe(one.rank.mesh)}`",
            f"{time.passes} x {work.sequences} x {one.rank.tokens:,}, {again}",
            f"{one.memory.total / GIB:.1f}",
            f"{time.seconds:.2f}",
            f"{100 * sum(time.waiting.values()) / time.seconds:.0f} %",
            f"{time.tokens_per_second / 1e6:.2f} M",
            f"{100 * one.mfu:.1f} %",
            f"{one.days:.1f}",
        ]


PLAN_HEAD = (
    "GPUs",
    "mesh",
    "passes x sequences x tokens of a rank; layers",
    "GiB of a rank",
    "s a step",
    "waiting",
    "tokens/s",
    "MFU",
    "days for 1 T tokens",
)


def page(measured: dict[str, Any] | None) -> Iterator[str]:
    """Yield the lines of the page."""
    counts = parameter_counts(JambaConfig())
    short = [plan(gpus, 4096) for gpus in SIZES]
    long = [plan(gpus, LONG) for gpus in LONG_SIZES]
    yield "# Jamba v0.1 on 64 to 4,096 H100s, on paper"
    yield ""
    yield (
        "Written by `python -m benchmarks.plan_table --out docs/results/plan_train.md`; each row "
        "is what `jamba plan train jamba-v0.1 --gpus N --tokens 1T --batch-tokens 8M` finds. The "
        f"model has {counts.total / 1e9:.1f} billion parameters, {counts.active / 1e9:.1f} of them "
        "active."
    )
    yield ""
    yield (
        "No cluster was at hand: nothing here was run. The speed of one H100 was measured, that of "
        'links, networks and everything marked "chosen" below was not. What the arithmetic is '
        "worth where it could be held against measurements is in the last section."
    )
    yield ""
    yield "## Sequences of 4,096 tokens"
    yield ""
    yield from table(PLAN_HEAD, plan_rows(short))
    yield ""
    yield "## Sequences of 262,144 tokens"
    yield ""
    yield from table(PLAN_HEAD, plan_rows(long))
    yield ""
    yield "## Where the memory and the time of the smallest cluster go"
    yield ""
    first = short[0]
    yield from table(
        ("on a rank", "GiB"),
        ([name, f"{getattr(first.memory, name) / GIB:.2f}"] for name in first.memory.__slots__),
    )
    yield ""
    yield from table(
        ("seconds of a step", "forward", "backward"),
        (
            [part, f"{seconds:.3f}", f"{first.time.backward[part]:.3f}"]
            for part, seconds in first.time.forward.items()
        ),
    )
    yield ""
    waits = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in first.time.waiting.items())
    yield (
        f"Waiting: {waits}; optimizer {first.time.optimizer:.3f} s; not accounted for "
        f"{first.time.others:.3f} s."
    )
    yield ""
    yield from table(
        ("operations of a token", "forward", "backward", "computed a second time"),
        (
            [part, f"{one.forward:,.0f}", f"{one.backward:,.0f}", f"{one.again:,.0f}"]
            for part, one in token_flops(first.run).items()
        ),
    )
    yield ""
    yield "## Every number it rests on"
    yield ""
    yield from table(
        ("assumption", "value", "how it is known", "source"),
        (
            [name, f"{one.value:.6g} {one.unit}".strip(), one.origin, one.source]
            for name, one in first.run.device.assumptions()
        ),
    )
    yield ""
    yield from _rules()
    if measured is not None:
        yield from _measured(measured)


def _rules() -> Iterator[str]:
    yield "Rules that are no numbers:"
    yield ""
    for rule in (
        "Weights, gradients and moments are those of our trainer: float32 master weights, which "
        "are rounded to bfloat16 when they are gathered, gradient sums and two moments, all cut up "
        "over shard x context; experts over what `expert` leaves of shard x context. A_log and D "
        "are whole on every rank.",
        "Activations are what our layers keep on a CPU, to the byte; GPU kernels may keep less.",
        "Weights are gathered twice a pass and gradients scattered once in float32. Both hide "
        "behind computing but for the first and the last layer; that all-to-all and they share a "
        "network card is not counted.",
        "Sums over `tensor`, rows on their way to experts and what `context` passes on hide behind "
        "nothing. With `context` a pass is one sequence.",
        "Among the ranks of `context` the last one, which has the most keys, sets the time.",
        "Experts compute the rows that the router sends, filled up as `model/moe.py` does it.",
        "MFU counts 6 operations for each weight that a token meets, as a training run logs it.",
    ):
        yield f"* {rule}"
    yield ""


def _measured(record: dict[str, Any]) -> Iterator[str]:
    machine = record["hardware"]
    rows = record["rows"]
    within = sum(abs(one["ratio"] - 1) <= 0.25 for one in rows)
    yield "## The same arithmetic against measured steps"
    yield ""
    yield (
        f"`python -m benchmarks.training_plan`, {machine['processor']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, bfloat16. A step is forward, backward and optimizer; a worker "
        "is a pass on a core of its own. Prediction: operations timed one at a time at their own "
        "sizes, added up as the plan lists them. Both are processor seconds of a worker, best of "
        "several, on a machine that others used meanwhile. Activations, weights, gradients and "
        "moments are exact, to the byte, by `tests/analysis/training_cost`."
    )
    yield ""
    yield from table(
        ("shape", "workers", "predicted", "measured", "predicted / measured"),
        (
            [
                one["shape"],
                str(one["workers"]),
                f"{1e3 * one['predicted_seconds']:.0f} ms",
                f"{1e3 * one['measured_seconds']:.0f} ms",
                f"{one['ratio']:.2f}",
            ]
            for one in rows
        ),
    )
    yield ""
    yield f"{within} of {len(rows)} are within 25 %."


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measured", type=Path)
    options = parser.parse_args()
    measured = None if options.measured is None else json.loads(options.measured.read_text())
    text = "\n".join(page(measured)) + "\n"
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
