"""`jamba bench`: how fast a model reads and writes on this machine."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.cli.options import (
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    open_model,
)
from jamba_lm.cli.sampling_options import DEFAULT_PREFILL_TOKENS, PrefillOption

if TYPE_CHECKING:
    from jamba_lm.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Workload:
    """What one repetition does.

    Attributes:
        num_prompt_tokens: tokens each sequence reads.
        num_new_tokens: tokens each sequence then writes.
        batch: sequences at the same time.
        prefill_tokens: tokens read in one call, all sequences together.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    batch: int
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one repetition took, and the bytes of its states at the end."""

    prefill_seconds: float
    decode_seconds: float
    state_bytes: int


def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens each sequence reads.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens each sequence then writes.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements, after one to warm up.")] = 3,
    prefill_tokens: PrefillOption = DEFAULT_PREFILL_TOKENS,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "auto",
    json_wanted: JsonOption = False,
) -> None:
    """Measure how fast a model reads a prompt and writes an answer.

    The prompt is random tokens, and the likeliest token is taken each time: no tokenizer is needed.
    """
    from jamba_lm.cli.output import Output
    from jamba_lm.errors import InputError
    from jamba_lm.model.layout import draw_layers

    for name, value in {
        "--prompt-tokens": prompt_tokens,
        "--new-tokens": new_tokens,
        "--batch": batch,
        "--repeats": repeats,
        "--prefill-tokens": prefill_tokens,
    }.items():
        if value < 1:
            raise InputError(f"{name} is {value}: expected at least 1")
    output = Output(json_wanted)
    workload = Workload(prompt_tokens, new_tokens, batch, prefill_tokens)
    language_model = open_model(model, dtype, backend, threads)
    output.note(draw_layers(language_model.config))
    with output.progress("measuring", repeats + 1, "repetitions") as progress:
        timings = []
        for done in range(repeats + 1):
            timings.append(run_once(language_model, workload))
            progress.update(done + 1)
    values = {
        "model": model,
        "workload": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "prefill_tokens": prefill_tokens,
            "repeats": repeats,
        },
        **summary(workload, timings[1:]),
        "memory": {
            "peak_bytes": peak_bytes(),
            "weight_bytes": sum(p.nbytes for p in language_model.decoder.parameters()),
            "state_bytes": timings[-1].state_bytes,
        },
        "machine": describe_machine(),
        "dtype": str(language_model.dtype).removeprefix("torch."),
        "backends": backends(language_model),
    }
    for line in table(values):
        output.line(line)
    output.result(values)


def run_once(model: LanguageModel, workload: Workload) -> Timing:
    """Let fresh sequences read their prompts together, and then write together."""
    import torch

    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        model.config.vocab_size,
        (workload.batch, workload.num_prompt_tokens),
        generator=draw,
    ).tolist()
    states = [model.new_state() for _ in prompts]
    piece = max(1, workload.prefill_tokens // workload.batch)

    started = time.perf_counter()
    for first in range(0, workload.num_prompt_tokens, piece):
        logits_BV = model.next_logits([ids[first : first + piece] for ids in prompts], states)
    picked = logits_BV.argmax(dim=-1).tolist()
    read = time.perf_counter()
    for _ in range(workload.num_new_tokens):
        logits_BV = model.next_logits([[token] for token in picked], states)
        picked = logits_BV.argmax(dim=-1).tolist()
    written = time.perf_counter()
    return Timing(read - started, written - read, sum(state.num_bytes for state in states))


def summary(workload: Workload, timings: Sequence[Timing]) -> dict[str, Any]:
    """Return tokens per second of reading and of writing: median, smallest and largest."""
    num_read = workload.batch * workload.num_prompt_tokens
    num_written = workload.batch * workload.num_new_tokens
    return {
        "prefill_tokens_per_second": spread([num_read / one.prefill_seconds for one in timings]),
        "decode_tokens_per_second": spread([num_written / one.decode_seconds for one in timings]),
    }


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Return the median and the extremes."""
    import statistics  # brings half a dozen modules that no other command needs

    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def peak_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    import resource  # exists on Unix only, and `jamba --help` should work everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to know to compare the numbers."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def backends(model: LanguageModel) -> dict[str, str]:
    """Return which back-end runs each operation of this model."""
    import torch

    from jamba_lm.kernels import ops

    like = torch.zeros(1, dtype=model.dtype)
    names = {op for module in ops.BACKENDS.values() for op in module.OPERATIONS}
    return {
        op: ops.choose(op, like, backend=model.backend).__name__.rsplit(".", 1)[-1]
        for op in sorted(names)
    }


def table(values: dict[str, Any]) -> list[str]:
    """Lay the results out for a person."""
    from jamba_lm.cli.quantities import show_bytes

    workload, memory, machine = values["workload"], values["memory"], values["machine"]
    lines = [
        f"{values['model']}: {values['dtype']}, {machine['threads']} threads, "
        f"batch {workload['batch']}, {workload['repeats']} repetitions",
        f"{'tokens/s':<14}{'median':>12}{'min':>12}{'max':>12}",
    ]
    for name, count in (("prefill", "prompt_tokens"), ("decode", "new_tokens")):
        rates = values[f"{name}_tokens_per_second"]
        label = f"{name} {workload[count]:,}"
        lines.append(
            f"{label:<14}" + "".join(f"{rates[key]:>12,.1f}" for key in ("median", "min", "max"))
        )
    lines.append(
        f"peak memory {show_bytes(memory['peak_bytes'])}, of it weights "
        f"{show_bytes(memory['weight_bytes'])} and states {show_bytes(memory['state_bytes'])}"
    )
    lines.append(", ".join(f"{op}: {name}" for op, name in values["backends"].items()))
    return lines
