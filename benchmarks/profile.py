"""Where each microsecond of a decode step and of a prefill goes, held against its own floor.

    python -m benchmarks.profile [--shape tiny] [--type bf16] [--batch 1] [--threads 2] [--out FILE]

Every operation is timed from outside the model: hooks on its modules, and timers around the
operations of `kernels/ops`. What is left of a module's time after its operations is its glue:
Python, copies, sorting. A step without timers is measured in alternation, and the difference is
what the timers cost. Few tokens are read by one native call, which cannot be seen into from here:
it is held against the floor of all its parts, and the same step is also taken module by module.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.comparison_run import TYPES
from benchmarks.engine_worker import random_ids
from benchmarks.limits import speeds_now
from benchmarks.llama_cpp import cache_folder
from benchmarks.our_model import open_model, packed_folder
from benchmarks.quiet import Verdict
from benchmarks.record import hardware, write_json
from benchmarks.timing import Action, Patience, Stopwatch
from jamba_lm.analysis.roofline import Call, model_work
from jamba_lm.kernels import ops
from jamba_lm.kernels.library import Library
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.batch import Batch
from jamba_lm.model.state import SequenceState
from jamba_lm.stepper import Stepper

# Parts of the roofline, by the end of a module's name.
MODULE_PARTS = {
    **{f"mixer.{name}_proj": "Mamba projections" for name in ("in", "x", "dt", "out")},
    **{f"mixer.{name}_proj": "attention projections" for name in "qkvo"},
    **{f"feed_forward.{name}_proj": "MLP" for name in ("gate", "up", "down")},
    "feed_forward.router": "router",
    "embedding": "embedding",
}
OPERATION_PARTS = {
    "causal_conv": "convolution",
    "selective_scan": "scan",
    "attention": "attention",
    "rms_norm": "norms",
    "silu_gate": "gates",
}
NATIVE_STEP = "the native step"
WHOLE_FUNCTIONS = ("jamba_step", "jamba_prefill")
OUTSIDE = "Python around all of these"
STEPS = 8


class Parts:
    """Seconds and calls of each part; a part's own time is without what it called.

    Args:
        clock: seconds that have passed, since whenever.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[tuple[str, float]] = []
        self._inside: list[float] = []

    def enter(self, part: str) -> None:
        """Begin a part."""
        self._open.append((part, self._clock()))
        self._inside.append(0.0)

    def leave(self) -> None:
        """End the part that began last."""
        part, started = self._open.pop()
        taken = self._clock() - started
        self.seconds[part] += taken - self._inside.pop()
        if self._open:
            self._inside[-1] += taken
        # A part within itself, such as an operation in its module, is one call.
        if not self._open or self._open[-1][0] != part:
            self.calls[part] += 1


def part_of(name: str, module: nn.Module) -> str:
    """Return the part that a module's own time belongs to."""
    if ".experts." in name:
        return "experts"
    for ending, part in MODULE_PARTS.items():
        if name == ending or name.endswith(f".{ending}"):
            return part
    kind = type(module).__name__
    return "norms" if kind in ("RMSNorm", "NoNorm") else f"glue of {kind}"


@contextmanager
def watched(model: LanguageModel, parts: Parts) -> Iterator[None]:
    """Time every module of the model and every operation into `parts`, meanwhile."""
    hooks: list[Any] = []
    watched_functions = [(ops, name, part) for name, part in OPERATION_PARTS.items()]
    originals = [(place, name, getattr(place, name)) for place, name, _ in watched_functions]

    def enter(part: str) -> Callable[..., None]:
        return lambda *_: parts.enter(part)

    def leave(*_: Any) -> None:
        parts.leave()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            parts.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                parts.leave()

        return run

    for name, module in model.decoder.named_modules():
        # A list of modules is never called, and the head is timed with what `logits` does to it.
        if isinstance(module, nn.ModuleList) or name == "head":
            continue
        hooks.append(module.register_forward_pre_hook(enter(part_of(name, module))))
        hooks.append(module.register_forward_hook(leave))
    for place, name, part in watched_functions:
        setattr(place, name, timed(part, getattr(place, name)))
    call = Library.call
    whole = timed(NATIVE_STEP, call)

    def call_watched(library: Library, function: str, *arguments: Any) -> None:
        # Other functions are a part of the operation that calls them.
        (whole if function in WHOLE_FUNCTIONS else call)(library, function, *arguments)

    Library.call = call_watched  # type: ignore[method-assign, assignment]
    logits = model.decoder.logits
    model.decoder.logits = timed("head", logits)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for place, name, function in originals:
            setattr(place, name, function)
        Library.call = call  # type: ignore[method-assign]
        del model.decoder.logits


@dataclass(slots=True)
class Phase:
    """A decode step or a prefill."""

    name: str
    call: Call
    repeats: int
    prepare: Callable[[], list[SequenceState]]
    run: Callable[[list[SequenceState]], object]

    def seconds(self, model: LanguageModel, parts: Parts | None = None) -> float:
        """Run it once, with timers when there are parts to fill, and return how long it took."""
        states = self.prepare()
        with ExitStack() as stack:
            if parts is not None:
                stack.enter_context(watched(model, parts))
            started = time.perf_counter()
            self.run(states)
            return time.perf_counter() - started


def phases(model: LanguageModel, batch: int, prompt_tokens: int) -> list[Phase]:
    """Return what is profiled."""
    prompts = random_ids(model.config.vocab_size, batch, prompt_tokens)

    def fresh() -> list[SequenceState]:
        return [model.new_state() for _ in prompts]

    def after_a_prompt() -> list[SequenceState]:
        states = fresh()
        model.next_logits([ids[:16] for ids in prompts], states)
        return states

    stepper = Stepper(model)

    def write(states: list[SequenceState]) -> None:
        picked = [ids[0] for ids in prompts]
        for _ in range(STEPS):
            logits = stepper.read([[one] for one in picked], [1] * batch, states)
            picked = [int(logits_V.argmax()) for (logits_V,) in logits]

    def write_by_modules(states: list[SequenceState]) -> None:
        ids_M = torch.tensor([ids[0] for ids in prompts])
        for _ in range(STEPS):
            batch_of_one_each = Batch.of([1] * batch, states, model.backend)
            with torch.no_grad():
                ids_M = model.decoder(ids_M, batch_of_one_each, rows="last").argmax(-1)

    def read(states: list[SequenceState]) -> None:
        model.next_logits(prompts, states)

    step, name = Call(batch, 1, 16), f"decode, batch {batch}"
    return [
        Phase(name, step, STEPS, after_a_prompt, write),
        Phase(f"{name}, module by module", step, STEPS, after_a_prompt, write_by_modules),
        Phase(f"prefill {prompt_tokens}", Call(batch, prompt_tokens, 0), 1, fresh, read),
    ]


def profile(
    model: LanguageModel, phase: Phase, watch: Stopwatch, patience: Patience
) -> tuple[dict[str, Verdict], list[Parts]]:
    """Take samples of a phase without timers and with them; returns the parts of the latter."""
    taken: list[Parts] = []

    def with_timers() -> float:
        taken.append(Parts())
        return phase.seconds(model, taken[-1])

    actions: dict[str, Action] = {
        "plain": partial(phase.seconds, model),
        "with timers": with_timers,
    }
    verdicts = watch.alternate(actions, patience)
    # The first of them was the warm-up.
    return verdicts, taken[1:]


def table_of(
    phase: Phase, verdicts: dict[str, Verdict], taken: Sequence[Parts], floors: dict[str, float]
) -> list[dict[str, Any]]:
    """Return a row for each part: microseconds of one step, its calls and its floor."""
    timed = verdicts["with timers"]
    quiet = timed.problem is None
    chosen = [parts for parts, good in zip(taken, timed.quiet, strict=True) if good or not quiet]
    names = dict.fromkeys(name for parts in chosen for name in parts.seconds)
    rows: list[dict[str, Any]] = [
        {
            "part": name,
            "calls": statistics.median(parts.calls[name] for parts in chosen) / phase.repeats,
            "microseconds": 1e6
            * statistics.median(parts.seconds[name] for parts in chosen)
            / phase.repeats,
            "floor_microseconds": 1e6 * floors.get(name, 0.0),
        }
        for name in names
    ]
    whole = 1e6 * timed.seconds / phase.repeats
    outside = max(0.0, whole - sum(float(row["microseconds"]) for row in rows))
    rows.append({"part": OUTSIDE, "calls": 1, "microseconds": outside, "floor_microseconds": 0.0})
    return sorted(rows, key=lambda row: -float(row["microseconds"]))


def render(phase: Phase, verdicts: dict[str, Verdict], rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    plain, timed = (
        verdicts[name].seconds * 1e6 / phase.repeats for name in ("plain", "with timers")
    )
    floor = sum(float(row["floor_microseconds"]) for row in rows)
    lines = [
        f"{phase.name}: {plain:,.0f} us, floor {floor:,.0f} us; with timers {timed:,.0f} us",
        "",
        "| part | calls | us | share | floor, us | times its floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        own, least = row["microseconds"], row["floor_microseconds"]
        times = f"{own / least:.1f}" if least > 0 else ""
        lines.append(
            f"| {row['part']} | {row['calls']:g} | {own:,.1f} | {100 * own / timed:.1f} % "
            f"| {least:,.1f} | {times} |"
        )
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
    for phase in phases(model, options.batch, options.prompt):
        patience = Patience(options.samples, 60, options.seconds)
        verdicts, taken = profile(model, phase, watch, patience)
        floors: dict[str, float] = defaultdict(float)
        for work in model_work(model.config, phase.call, options.weights):
            floors[work.part] += work.floor(speeds)
        floors[NATIVE_STEP] = sum(floors.values())
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
