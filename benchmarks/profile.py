"""Where each microsecond of a decode step and of a prefill goes, held against its own floor.

    python -m benchmarks.profile [--shape tiny] [--type bf16] [--batch 1] [--past 16] [--out FILE]

A native call tells itself what its threads did, and when they waited for each other. The same step
is also taken module by module, timed from outside: hooks on the modules, and timers around the
operations of `kernels/ops`; what is left of a module's time after its operations is its glue:
Python, copies, sorting. A step without timers is measured in alternation, and the difference is
what the timers cost.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.comparison_run import TYPES
from benchmarks.engine_worker import random_ids
from benchmarks.limits import speeds_now
from benchmarks.llama_cpp import cache_folder
from benchmarks.module_timers import Parts, watched
from benchmarks.our_model import open_model, packed_folder
from benchmarks.quiet import Verdict
from benchmarks.record import hardware, write_json
from benchmarks.timing import Action, Patience, Stopwatch
from jamba_lm.analysis.roofline import Call, model_work
from jamba_lm.analysis.workload import plan_with_parts
from jamba_lm.kernels.part_times import PartTime
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.batch import Batch
from jamba_lm.model.state import SequenceState
from jamba_lm.native_plan import timed
from jamba_lm.stepper import Stepper

OUTSIDE = "Python around all of these"
STEPS = 8
DETAILS = {
    "cutting_weights": "cutting weights",
    "cutting_rows": "cutting rows",
    "giving_results": "giving results",
    "waiting": "waiting",
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What one part of a run took.

    Attributes:
        seconds: in all.
        calls: how often it began; None where a native call tells, which does not count.
        detail: of a native call.
    """

    seconds: float
    calls: int | None = None
    detail: PartTime | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A decode step or a prefill.

    Attributes:
        name: as it is shown.
        call: whose floor it is held against.
        repeats: steps of one run.
        native: whether each is one native call, or a call for every module.
        prepare: makes ready what `run` then does.
    """

    name: str
    call: Call
    repeats: int
    native: bool
    prepare: Callable[[], Callable[[], object]]

    def seconds(self) -> float:
        """Run it once, and return how long it took."""
        run = self.prepare()
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def parts(self, model: LanguageModel) -> tuple[float, dict[str, Spent]]:
        """Run it once with timers, and return how long it took, and each of its parts."""
        with timers(model, native=self.native) as (clear, read):
            run = self.prepare()
            clear()
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            return seconds, read()


@contextmanager
def timers(
    model: LanguageModel, *, native: bool
) -> Iterator[tuple[Callable[[], None], Callable[[], dict[str, Spent]]]]:
    """Time the parts of a model, meanwhile; gives what forgets them and what returns them."""
    if native:
        with timed(plan_with_parts(model)) as times:
            yield (
                times.clear,
                lambda: {part: Spent(one.whole, detail=one) for part, one in times.parts().items()},
            )
        return
    parts = Parts()
    with watched(model, parts):
        yield (
            parts.clear,
            lambda: {part: Spent(parts.seconds[part], parts.calls[part]) for part in parts.seconds},
        )


def phases(
    model: LanguageModel, batch: int, prompt_tokens: int, past_tokens: int = 16
) -> list[Phase]:
    """Return what is profiled.

    Args:
        model: what runs.
        batch: sequences at the same time.
        prompt_tokens: that a prefill reads of each.
        past_tokens: that each has read before it writes.
    """
    prompts = random_ids(model.config.vocab_size, batch, prompt_tokens)
    pasts = random_ids(model.config.vocab_size, batch, past_tokens)

    @functools.cache
    def read_states() -> list[SequenceState]:
        states = fresh()
        model.next_logits(pasts, states)
        return states

    def fresh() -> list[SequenceState]:
        return [model.new_state() for _ in prompts]

    def after_the_past() -> list[SequenceState]:
        return [state.fork() for state in read_states()]

    def write() -> Callable[[], object]:
        stepper, states = Stepper(model), after_the_past()
        # The sequences are described once, by the first step.
        stepper.read([ids[-1:] for ids in prompts], [1] * batch, states)

        def run() -> None:
            picked = [ids[0] for ids in prompts]
            for _ in range(STEPS):
                logits = stepper.read([[one] for one in picked], [1] * batch, states)
                picked = [int(logits_V.argmax()) for (logits_V,) in logits]

        return run

    def write_by_modules() -> Callable[[], object]:
        states = after_the_past()

        def run() -> None:
            ids_M = torch.tensor([ids[0] for ids in prompts])
            for _ in range(STEPS):
                batch_of_one_each = Batch.of([1] * batch, states, model.backend)
                with torch.no_grad():
                    ids_M = model.decoder(ids_M, batch_of_one_each, rows="last").argmax(-1)

        return run

    def read() -> Callable[[], object]:
        return partial(model.next_logits, prompts, fresh())

    step, name = Call(batch, 1, past_tokens), f"decode, batch {batch}"
    if past_tokens != 16:
        name += f", after {past_tokens:,} tokens"
    prompt = Call(batch, prompt_tokens, 0)
    return [
        Phase(name, step, STEPS, True, write),
        Phase(f"{name}, module by module", step, STEPS, False, write_by_modules),
        Phase(f"prefill {prompt_tokens}", prompt, 1, True, read),
    ]


def profile(
    model: LanguageModel, phase: Phase, watch: Stopwatch, patience: Patience
) -> tuple[dict[str, Verdict], list[dict[str, Spent]]]:
    """Take samples of a phase without timers and with them; returns the parts of the latter."""
    taken: list[dict[str, Spent]] = []

    def with_timers() -> float:
        seconds, parts = phase.parts(model)
        taken.append(parts)
        return seconds

    actions: dict[str, Action] = {"plain": phase.seconds, "with timers": with_timers}
    verdicts = watch.alternate(actions, patience)
    # The first of them was the warm-up.
    return verdicts, taken[1:]


def table_of(
    phase: Phase,
    verdicts: dict[str, Verdict],
    taken: Sequence[Mapping[str, Spent]],
    floors: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return a row for each part: microseconds of one step, what they went to, and its floor."""
    verdict = verdicts["with timers"]
    quiet = verdict.problem is None
    chosen = [parts for parts, good in zip(taken, verdict.quiet, strict=True) if good or not quiet]
    names = dict.fromkeys(name for parts in chosen for name in parts)

    def median(name: str, value: Callable[[Spent], float]) -> float:
        # A part may be missing from a run: one that took no measurable time.
        return (
            statistics.median(value(parts[name]) if name in parts else 0.0 for parts in chosen)
            / phase.repeats
        )

    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"part": name}
        if phase.native:
            for field in DETAILS:
                row[field] = 1e6 * median(name, attrgetter(f"detail.{field}"))
        else:
            row["calls"] = median(name, attrgetter("calls"))
        row["microseconds"] = 1e6 * median(name, attrgetter("seconds"))
        row["floor_microseconds"] = 1e6 * floors.get(name, 0.0)
        rows.append(row)
    whole = 1e6 * verdict.seconds / phase.repeats
    outside = max(0.0, whole - sum(float(row["microseconds"]) for row in rows))
    rows.append({"part": OUTSIDE, "calls": 1, "microseconds": outside, "floor_microseconds": 0.0})
    return sorted(rows, key=lambda row: -float(row["microseconds"]))


def render(phase: Phase, verdicts: dict[str, Verdict], rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    plain, with_timers = (
        verdicts[name].seconds * 1e6 / phase.repeats for name in ("plain", "with timers")
    )
    floor = sum(float(row["floor_microseconds"]) for row in rows)
    extra = DETAILS if phase.native else {"calls": "calls"}
    heads = ["part", "us", "share", "floor, us", "times its floor"]
    heads += [f"of it {title}" if phase.native else title for title in extra.values()]
    lines = [
        f"{phase.name}: {plain:,.0f} us, floor {floor:,.0f} us; with timers {with_timers:,.0f} us",
        "",
        f"| {' | '.join(heads)} |",
        f"| --- |{' ---: |' * (len(heads) - 1)}",
    ]
    for row in rows:
        own, least = row["microseconds"], row["floor_microseconds"]
        cells = [row["part"], f"{own:,.1f}", f"{100 * own / with_timers:.1f} %", f"{least:,.1f}"]
        cells.append(f"{own / least:.1f}" if least > 0 else "")
        for field in extra:
            value = row.get(field, 0.0)
            cells.append((f"{value:,.1f}" if phase.native else f"{value:g}") if value else "")
        lines.append(f"| {' | '.join(cells)} |")
    problems = [verdict.problem for verdict in verdicts.values() if verdict.problem]
    if problems:
        lines += ["", f"CONTAMINATED, do not quote: {problems[0]}"]
    return "\n".join(lines)


def main() -> None:
    """Print a table for each phase and, with --out, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--type", choices=TYPES, default="bf16", dest="weights")
    parser.add_argument("--batch", type=int, default=1, help="sequences at the same time")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--past", type=int, default=16, help="tokens before a decode step")
    parser.add_argument("--phases", choices=("all", "decode"), default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7, help="quiet samples wanted")
    parser.add_argument("--seconds", type=float, default=60.0, help="most time for a phase")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    watch = Stopwatch(options.threads)
    folder = packed_folder(checkpoint(options.shape, options.cache), options.weights)
    model = open_model(folder, options.weights)
    speeds = speeds_now(model.config, options.weights, options.threads)
    record: dict[str, Any] = {"hardware": hardware(), "speeds": asdict(speeds), "phases": {}}
    contaminated = False
    wanted = phases(model, options.batch, options.prompt, options.past)
    for phase in wanted if options.phases == "all" else wanted[:1]:
        patience = Patience(options.samples, 60, options.seconds)
        verdicts, taken = profile(model, phase, watch, patience)
        floors: dict[str, float] = defaultdict(float)
        for work in model_work(model.config, phase.call, options.weights):
            floors[work.operation] += work.floor(speeds)
        rows = table_of(phase, verdicts, taken, floors)
        print(render(phase, verdicts, rows), end="\n\n")
        contaminated |= any(verdict.problem for verdict in verdicts.values())
        record["phases"][phase.name] = {
            "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
            "parts": rows,
        }
    write_json(options.out, record)
    sys.exit(1 if contaminated else 0)


if __name__ == "__main__":
    main()
