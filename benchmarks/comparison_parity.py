"""Whether the engines compute the same: each is asked for logits and for what it writes next."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import engine_client, llama_cpp, packed_parity, parity_gate
from benchmarks.checkpoints import truth_type
from benchmarks.comparison_run import LLAMA_TYPES, Run, peer_type, place_of
from benchmarks.engine_client import Worker, worker
from benchmarks.our_model import open_model, packed_folder
from jamba_lm.presets import preset

PARITY_TOKENS, GREEDY_TOKENS = 96, 24

# The type an engine computes in, its logits of a prompt, and how it goes on.
Answer = tuple[str, Any, list[int]]


def check_parity(run: Run, shape: str, weights: str, folder: Path) -> dict[str, Any]:
    """Compare every engine with the truth; returns a record for each engine that answered."""
    config, wide = preset(shape), truth_type(shape)
    ids = engine_client.some_ids(config.vocab_size, PARITY_TOKENS)
    found: dict[str, Answer] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name, answer in answers(run, folder, weights, ids, place).items():
            try:
                found[name] = answer()
            except engine_client.EngineFailure as failure:
                run.say(f"  {name}: failed, and is left out: {failure}")
                failed[name] = str(failure)
        with worker("transformers", folder, wide, run.threads) as truth:
            judged = held_against(truth, found, ids, place)
        records: dict[str, dict[str, Any]] = {}
        if "jamba" in judged and weights in packed_parity.WEIGHT_BOUNDS:
            ours = found["jamba"]
            as_used, kept, problem = with_same_weights(run, weights, folder, ours, ids, place)
            judged["jamba"] = packed_parity.judged(judged["jamba"], as_used, problem)
            records["jamba"] = {
                "error_with_same_weights": as_used.error,
                "error_with_rows_kept": kept,
            }
            run.say(
                f"  jamba: error {as_used.error:.2g} against the same rounded weights, "
                f"{kept:.2g} with rows kept as they are"
            )
    for name, parity in judged.items():
        verdict = parity.problem or "the same to rounding"
        run.say(f"  {name}: error {parity.error:.2g}, top-1 {parity.top1:.3f}: {verdict}")
    records = {name: asdict(parity) | records.get(name, {}) for name, parity in judged.items()}
    if {"jamba", "transformers"} <= judged.keys() and weights == "bf16" and wide == "fp32":
        ratio = judged["jamba"].median_error / judged["transformers"].median_error
        records["jamba"]["error_over_transformers"] = ratio
        if ratio > parity_gate.BF16_RATIO:
            records["jamba"]["problem"] = f"its error is {ratio:.2f} times that of transformers"
    return {"truth": f"transformers {wide}", "engines": records, "failed": failed}


def held_against(
    truth: Worker, found: dict[str, Answer], ids: list[int], place: Path
) -> dict[str, parity_gate.Parity]:
    """Compare what engines answered with what one of them says that is taken for true."""
    expected = truth.logits(ids, place)
    likeliest = truth.ask("greedy", ids=ids, tokens=GREEDY_TOKENS)["ids"]
    judged = {}
    for name, (kind, logits, greedy) in found.items():
        along = truth.logits([*ids, *greedy], place)[len(ids) - 1 : -1]
        # What rounding weights costs is no error; `with_same_weights` looks for those.
        bound = math.inf if kind in packed_parity.WEIGHT_BOUNDS else None
        judged[name] = parity_gate.compare(
            kind, logits, expected, greedy, likeliest, along, bound=bound
        )
    return judged


def with_same_weights(
    run: Run, weights: str, folder: Path, answer: Answer, ids: list[int], place: Path
) -> tuple[parity_gate.Parity, float, str | None]:
    """Compare a packed model with transformers that holds what the packed weights stand for.

    Returns:
        How far its logits are off as it is used; their error with rows kept as they are; and what
        is wrong with that or with the weights, if anything.
    """
    packed, wide = packed_folder(folder, weights), truth_type(folder.name)
    ours = open_model(packed, weights)
    problem = packed_parity.weight_problem(weights, open_model(folder, "bf16"), ours)
    kept = packed_parity.logits_with_rows_kept(ours, ids)
    del ours
    _, logits, greedy = answer
    with (
        packed_parity.unpacked(packed) as plain,
        worker("transformers", plain, wide, run.threads) as truth,
    ):
        as_used = {"jamba": (packed_parity.used_kind(weights), logits, greedy)}
        found = held_against(truth, as_used, ids, place)["jamba"]
        kind, expected = packed_parity.unpacked_kind(weights), truth.logits(ids, place)
        arithmetic = parity_gate.compare(kind, kept, expected, [], [], expected[:0])
    return found, arithmetic.error, problem or arithmetic.problem


def answers(
    run: Run, folder: Path, weights: str, ids: list[int], place: Path
) -> dict[str, Callable[[], Answer]]:
    """Return, for each engine by name, what asks it the same thing."""

    def ask_worker(engine: str) -> Answer:
        with worker(*place_of(engine, folder, weights), run.threads) as asked:
            greedy = asked.ask("greedy", ids=ids, tokens=GREEDY_TOKENS)["ids"]
            kind = weights if engine == "jamba" else peer_type(weights)
            return kind, asked.logits(ids, place), greedy

    def ask_llama(llama: llama_cpp.LlamaCpp, kind: str) -> Answer:
        model = llama_cpp.gguf_file(llama, folder, kind, run.threads)
        logits = llama.logits(model, ids, run.threads, place)
        return kind, logits, llama.greedy(model, ids, GREEDY_TOKENS, run.threads)

    asked: dict[str, Callable[[], Answer]] = {
        engine: partial(ask_worker, engine)
        for engine in ("jamba", "transformers")
        if engine in run.options.engines
    }
    if run.llama is not None:
        for kind in LLAMA_TYPES[weights]:
            asked[f"llama.cpp {kind}"] = partial(ask_llama, run.llama, kind)
    return asked
