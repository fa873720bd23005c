"""How far the predicted speed of a model is from the one that `jamba bench` then measures.

    python -m benchmarks.prediction [--shape tiny mid 3b] [--type bf16 int8 int4] [--batch 1]

Prediction and measurement are processes of their own, as a user runs them, in alternation. The
ratios mean something on a quiet machine only: the rate of multiply-adds is told before and after
each, and a pair that was disturbed is in brackets. Others on a host change its speed from minute to
minute: the ratio is the median of those of each prediction and the measurement after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.comparison_run import TYPES
from benchmarks.engine_client import environment
from benchmarks.llama_cpp import cache_folder
from benchmarks.our_model import packed_folder
from benchmarks.quiet import judge
from benchmarks.record import ROOT, hardware, write_json
from benchmarks.timing import Stopwatch

TARGET = 0.25
COMMAND = "import sys; from jamba_lm.cli.main import main; sys.exit(main())"


def jamba(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run a `jamba` command as a process and return what `--json` printed."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, "--json"],
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: jamba {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def compare(
    folder: Path, weights: str, batch: int, rounds: int, watch: Stopwatch
) -> dict[str, Any]:
    """Predict and measure in turn; returns medians, and what disturbed them."""
    found: dict[str, list[dict[str, float]]] = {"predicted": [], "measured": []}
    plan = ["plan", str(folder), "--this-machine", "--weights", weights, "--batch", str(batch)]
    # The checkpoint says how it is packed; floats are converted.
    dtype = ["--dtype", weights] if weights in ("bf16", "fp32") else []
    bench = ["bench", str(packed_folder(folder, weights)), "--batch", str(batch), *dtype]
    samples = []
    for _ in range(rounds):
        for name, arguments in (("predicted", plan), ("measured", bench)):
            answer, sample = watch.observe(partial(jamba, arguments, watch.threads))
            samples.append(sample)
            found[name].append(speeds_of(name, answer))
    # What is compared are medians of commands of very different lengths: only disturbances count.
    problem = judge(samples).disturbed
    return {"problem": problem, **medians(found["predicted"], found["measured"]), "rounds": found}


def medians(
    predicted: list[dict[str, float]], measured: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the median speed of each phase, and that of the ratios of both of a round."""
    phases = ("prefill", "decode")
    rounds = list(zip(predicted, measured, strict=True))
    return {
        "predicted": {one: statistics.median(found[one] for found in predicted) for one in phases},
        "measured": {one: statistics.median(found[one] for found in measured) for one in phases},
        "ratio": {
            one: statistics.median(said[one] / was[one] for said, was in rounds) for one in phases
        },
    }


def speeds_of(name: str, answer: dict[str, Any]) -> dict[str, float]:
    """Return tokens a second of reading and writing from what a command printed."""
    if name == "predicted":
        return {
            phase: float(answer["prediction"][phase]["tokens_per_second"])
            for phase in ("prefill", "decode")
        }
    return {
        phase: float(answer[f"{phase}_tokens_per_second"]["median"])
        for phase in ("prefill", "decode")
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table."""
    lines = [
        "| model | phase | predicted, tokens/s | measured | predicted / measured |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        for phase in ("prefill", "decode"):
            predicted, measured = row["predicted"][phase], row["measured"][phase]
            ratio = f"{row['ratio'][phase]:.2f}"
            shown = ratio if row["problem"] is None else f"[{ratio}]"
            lines.append(
                f"| {row['shape']} {row['type']} | {phase} | {predicted:,.1f} | {measured:,.1f} "
                f"| {shown} |"
            )
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """List the predictions that were further off than promised."""
    return [
        f"{row['shape']} {row['type']}, {phase}"
        for row in rows
        for phase in ("prefill", "decode")
        if abs(row["ratio"][phase] - 1) > TARGET
    ]


def main() -> None:
    """Print the table and, with --out, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--type", nargs="+", choices=TYPES, default=["bf16", "int8", "int4"], dest="types"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at the same time")
    parser.add_argument("--rounds", type=int, default=3, help="of a prediction and a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    watch = Stopwatch(options.threads)
    rows = []
    for shape in options.shape:
        for weights in options.types:
            folder = checkpoint(shape, options.cache)
            row = compare(folder, weights, options.batch, options.rounds, watch)
            rows.append({"shape": shape, "type": weights, **row})
            watch.log(table(rows[-1:]))
            if row["problem"]:
                watch.log(f"  {shape} {weights}: CONTAMINATED: {row['problem']}")
    print(table(rows))
    write_json(options.out, {"hardware": hardware(), "target": TARGET, "rows": rows})
    far = missed(rows)
    if far:
        print(f"further off than {100 * TARGET:.0f} %: {', '.join(far)}", file=sys.stderr)
    sys.exit(1 if far or any(row["problem"] for row in rows) else 0)


if __name__ == "__main__":
    main()
