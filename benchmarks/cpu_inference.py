"""Ours, transformers and llama.cpp on the same weights and the same quiet machine.

    python -m benchmarks.cpu_inference [--shape tiny mid 3b] [--type bf16 int8 int4]
        [--engines jamba,transformers,llama.cpp] [--llama-cpp DIR] [--out DIR] [--resume]
        [--write docs/results/cpu.md]

First the machine is calibrated and the engines are compared: same logits to the rounding of the
type, same greedy tokens. Then they are measured in alternation, and in the same rounds what the
machine could do at that moment. Samples that others of this machine disturbed are thrown away, and
a ratio that is not known to within a tenth is reported as such, with status 1. An engine that fails
is named and left out. Each block (a shape in a type) is written when it is done; `--resume` goes on
behind the last one. Checkpoints and llama.cpp are kept in a cache folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import engine_client, llama_cpp
from benchmarks.calibration import measure_peaks
from benchmarks.checkpoints import SHAPES, checkpoint, fits_together
from benchmarks.comparison_parity import check_parity
from benchmarks.comparison_report import MACHINE, markdown, plot, replace_tables
from benchmarks.comparison_run import ENGINES, TYPES, Run, place_of
from benchmarks.comparison_verdict import problems_of
from benchmarks.engine_client import Worker, worker
from benchmarks.limits import speeds_now
from benchmarks.quiet import Verdict
from benchmarks.ratios import paired
from benchmarks.record import hardware, write_json
from benchmarks.timing import Patience, Stopwatch
from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.analysis.roofline import Call, floor_seconds, model_work
from jamba_lm.config import JambaConfig
from jamba_lm.presets import preset

# Tokens written in one sample: long enough to time, short enough to be quiet.
NEW_TOKENS = {"tiny": 64, "mid": 32, "3b": 16}
DECODE_PROMPT = 16
COLD_RUNS = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is measured: reading a prompt, or writing by so many sequences."""

    name: str
    deed: str
    batch: int
    tokens: int

    @property
    def rows(self) -> int:
        """Tokens read or written in one sample."""
        return self.batch * self.tokens

    def calls(self) -> list[Call]:
        """List the forward calls of one sample."""
        if self.deed == "prefill":
            firsts = range(0, self.tokens, 512)
            return [Call(self.batch, min(512, self.tokens - first), first) for first in firsts]
        return [Call(self.batch, 1, DECODE_PROMPT + written) for written in range(self.tokens)]


def measures(shape: str, prompts: list[int], batches: list[int]) -> list[Measure]:
    """List what is measured of a shape."""
    new = NEW_TOKENS[shape]
    return [
        *(Measure(f"prefill {tokens:,}", "prefill", 1, tokens) for tokens in prompts),
        *(Measure(f"decode, batch {batch}", "decode", batch, new) for batch in batches),
    ]


def floor_now(run: Run, config: JambaConfig, weights: str, measure: Measure) -> float:
    """Return the least seconds a sample could take on the machine as it is at this moment."""
    speeds = speeds_now(config, weights, run.threads, tries=2)
    return sum(floor_seconds(model_work(config, call, weights), speeds) for call in measure.calls())


def measure_speed(
    run: Run, shape: str, weights: str, folder: Path, engines: list[str]
) -> dict[str, dict[str, Any]]:
    """Measure the engines in alternation; returns a record for each measure."""
    found: dict[str, dict[str, Any]] = {}
    ours = [engine for engine in ("jamba", "transformers") if engine in engines]
    kinds = [name.removeprefix("llama.cpp ") for name in engines if name.startswith("llama.cpp ")]
    together = fits_together(shape, len(ours) + len(kinds))
    for measure in measures(shape, run.options.prompts, run.options.batches):
        run.say(f"{shape} {weights}: {measure.name}")
        with ExitStack() as stack:
            running: list[Worker] = []
            actions: dict[str, Callable[[], float]] = {}
            for engine in ours:
                arguments = (*place_of(engine, folder, weights), run.threads)
                if together:
                    one = stack.enter_context(worker(*arguments))
                    running.append(one)
                    actions[engine] = partial(worker_seconds, one, measure)
                else:
                    actions[engine] = partial(alone_seconds, *arguments, measure)
            for kind in kinds:
                assert run.llama is not None
                model = llama_cpp.gguf_file(run.llama, folder, kind, run.threads)
                actions[f"llama.cpp {kind}"] = partial(
                    llama_seconds, run.llama, model, run.threads, measure
                )
            actions[MACHINE] = partial(floor_now, run, preset(shape), weights, measure)
            run.watch.pids = partial(pids_of, running)
            patience = Patience(run.options.samples, run.options.most, run.options.seconds)
            failed: dict[str, str] = {}
            verdicts = run.watch.alternate(actions, patience, failed=failed)
            run.watch.pids = partial(pids_of, [])
        found[measure.name] = speed_record(measure.rows, verdicts) | {"failed": failed}
    return found


def pids_of(running: list[Worker]) -> list[int]:
    """Name the processes that work for us."""
    return [one.process.pid for one in running]


def worker_seconds(running: Worker, measure: Measure) -> float:
    """Take one sample of an engine that is already there."""
    if measure.deed == "prefill":
        return running.seconds("prefill", tokens=measure.tokens, batch=measure.batch)
    return running.seconds(
        "decode", prompt=DECODE_PROMPT, tokens=measure.tokens, batch=measure.batch
    )


def alone_seconds(engine: str, folder: Path, kind: str, threads: int, measure: Measure) -> float:
    """Take one sample of an engine that is there only for it: not all fit side by side."""
    with worker(engine, folder, kind, threads) as running:
        worker_seconds(running, measure)
        return worker_seconds(running, measure)


def llama_seconds(llama: llama_cpp.LlamaCpp, model: Path, threads: int, measure: Measure) -> float:
    """Take one sample with llama.cpp's own programs."""
    if measure.deed == "prefill":
        return llama.prefill_seconds(model, measure.tokens, threads)
    if measure.batch == 1:
        return llama.decode_seconds(model, measure.tokens, threads)
    return llama.batched_decode_seconds(
        model, DECODE_PROMPT, measure.tokens, measure.batch, threads
    )


def measure_cold(
    run: Run, shape: str, weights: str, folder: Path, engines: list[str]
) -> dict[str, dict[str, Any]]:
    """Measure the first token from a cold start, and the most memory, of each engine alone."""
    starts: dict[str, Callable[[], float]] = {}
    memory: dict[str, int] = {}
    tokens = max(run.options.prompts)
    ids = range(2, 2 + engine_client.FIRST_PROMPT)
    for name in engines:
        if name.startswith("llama.cpp "):
            assert run.llama is not None
            kind = name.removeprefix("llama.cpp ")
            model = llama_cpp.gguf_file(run.llama, folder, kind, run.threads)
            starts[name] = partial(run.llama.first_token_seconds, model, ids, run.threads)
            memory[name] = run.llama.peak_bytes(model, tokens, run.threads)
        else:
            arguments = (*place_of(name, folder, weights), run.threads)
            starts[name] = partial(engine_client.first_token_seconds, *arguments)
            memory[name] = engine_client.peak_bytes(*arguments, tokens)
    run.say(f"{shape} {weights}: from the start of a process to its first token")
    patience = Patience(COLD_RUNS, run.options.most, run.options.seconds)
    failed: dict[str, str] = {}
    verdicts = run.watch.alternate(starts, patience, failed=failed)
    return {name: {"failed": why} for name, why in failed.items()} | {
        name: {
            "first_token": asdict(verdict),
            "seconds": verdict.seconds,
            "peak_bytes": memory[name],
        }
        for name, verdict in verdicts.items()
    }


def compare_engines(run: Run, shape: str, weights: str) -> dict[str, Any]:
    """Check and measure all engines on one shape in one type."""
    config = preset(shape)
    folder = checkpoint(shape, run.options.cache)
    run.say(f"{shape} {weights}: the same result?")
    parity = check_parity(run, shape, weights, folder)
    # Who computes something else is named in the record, and not measured.
    engines = [name for name, one in parity["engines"].items() if one["problem"] is None]
    block: dict[str, Any] = {"shape": shape, "type": weights, "parity": parity, "speed": {}}
    if not engines:
        return block
    block["speed"] = measure_speed(run, shape, weights, folder, engines)
    block["weight_bytes"] = weight_bytes(config, weights)
    if run.options.cold:
        block["cold"] = measure_cold(run, shape, weights, folder, engines)
    return block


def speed_record(rows: int, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Put together what became of one measure: speeds, and ratios of ours to all others."""
    ours = verdicts.get("jamba")
    return {
        "rows": rows,
        "engines": {
            name: asdict(verdict)
            | {"seconds": verdict.seconds, "tokens_per_second": rows / verdict.seconds}
            for name, verdict in verdicts.items()
        },
        "ratios": {
            name: asdict(paired(verdict, ours))
            for name, verdict in verdicts.items()
            if ours is not None and name != "jamba"
        },
    }


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--type", nargs="+", choices=TYPES, default=["bf16", "int8", "int4"], dest="types")
    add("--engines", default=",".join(ENGINES), help="with commas")
    add("--prompts", type=int, nargs="+", default=[128, 512, 2048], help="tokens to read")
    add("--batches", type=int, nargs="+", default=[1, 8], help="sequences that write")
    add("--threads", type=int, default=2)
    add("--samples", type=int, default=5, help="quiet samples wanted of everything")
    add("--most", type=int, default=30, help="samples of anything")
    add("--seconds", type=float, default=300.0, help="after which a block takes no more samples")
    add("--no-cold", action="store_false", dest="cold", help="no cold starts and no memory")
    add("--llama-cpp", type=Path, help="folder where llama.cpp was built")
    add("--cache", type=Path, default=llama_cpp.cache_folder(), help="for checkpoints")
    add("--out", type=Path, help="folder for cpu.json, cpu.md and cpu.png")
    add("--resume", action="store_true", help="keep the blocks that --out has of this commit")
    add("--write", type=Path, help="replace the tables in this document")
    options = parser.parse_args()
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the folder that was written to")
    options.engines = options.engines.split(",")
    unknown = set(options.engines) - set(ENGINES)
    if unknown:
        parser.error(f"no engine {', '.join(sorted(unknown))}; choose from {', '.join(ENGINES)}")
    return options


# What says where things lie on this machine is no part of how to repeat a run elsewhere.
PLACES = ("--llama-cpp", "--cache", "--out", "--write")


def command(arguments: Sequence[str]) -> str:
    """Write the command that repeats this run, on whatever machine."""
    kept, skip = [], False
    for argument in arguments:
        place = argument.split("=")[0] in PLACES
        if not (place or skip or argument == "--resume"):
            kept.append(argument)
        skip = place and "=" not in argument
    return " ".join(["python -m benchmarks.cpu_inference", *kept])


def blocks_before(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the blocks that `--resume` keeps, by shape and type.

    Raises:
        SystemExit: they were measured by another command or commit.
    """
    path = run.options.out / "cpu.json" if run.options.resume else None
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    ours = (command(sys.argv[1:]), hardware()["commit"])
    theirs = (before["command"], before["hardware"]["commit"])
    if theirs != ours:
        sys.exit(
            f"error: {path} is of {theirs[0]!r} at {theirs[1]}, this is {ours[0]!r} at {ours[1]}; "
            f"leave --resume out, or name another folder"
        )
    return {(block["shape"], block["type"]): block for block in before["blocks"]}


def main() -> None:
    """Calibrate, check, measure, and write what may be quoted."""
    options = parse_options()
    watch = Stopwatch(options.threads)
    llama = None
    if "llama.cpp" in options.engines:
        llama = llama_cpp.find_or_build(options.llama_cpp)
    watch.log("calibrating")
    run = Run(options, llama, measure_peaks(options.threads), watch)
    before = blocks_before(run)
    result: dict[str, Any] = {
        "command": command(sys.argv[1:]),
        "hardware": hardware(),
        "peaks": asdict(run.peaks),
        "blocks": [],
    }
    for shape, weights in product(options.shape, options.types):
        block = before.get((shape, weights))
        if block is None:
            block = compare_engines(run, shape, weights)
        else:
            run.say(f"{shape} {weights}: kept from the run before")
        result["blocks"].append(block)
        result["peaks_after"] = asdict(measure_peaks(options.threads))
        text = markdown(result)
        if options.out is not None:
            write_json(options.out / "cpu.json", result)
            (options.out / "cpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if options.out is not None:
        plot(result, options.out / "cpu.png")
    if options.write is not None:
        replace_tables(options.write, text)
    problems = problems_of(result)
    for problem in problems:
        print(f"CONTAMINATED or wrong: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
