"""`jamba bench`: how fast a model reads and writes on this machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.analysis.machine import peak_memory
from jamba_lm.cli.options import (
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
    note_slow_type,
    open_readable,
)
from jamba_lm.cli.sampling_options import DEFAULT_PREFILL_TOKENS, DraftOption, PrefillOption

if TYPE_CHECKING:
    from jamba_lm.analysis.workload import Timing, Workload
    from jamba_lm.readable_model import ReadableModel


def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens each sequence reads.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens each sequence then writes.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements, after one to warm up.")] = 3,
    prefill_tokens: PrefillOption = DEFAULT_PREFILL_TOKENS,
    draft: DraftOption = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="Also say where the time goes, part by part, in one repetition more.",
        ),
    ] = False,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Measure how fast a model reads a prompt and writes an answer.

    The prompt is random tokens, and the likeliest token is taken each time: no tokenizer is needed.
    """
    from jamba_lm.analysis.workload import Workload, plan_with_parts, run_by_parts, run_once
    from jamba_lm.cli.output import Output
    from jamba_lm.cli.part_table import part_lines, part_values
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
    workload = Workload(prompt_tokens, new_tokens, batch, prefill_tokens, draft)
    language_model = open_readable(model, dtype, backend, threads, quantize)
    note_slow_type(output, language_model, backend)
    if parts:
        plan_with_parts(language_model)
    output.note(draw_layers(language_model.config))
    num_runs = repeats + 1 + parts
    by_parts = None
    with output.progress("measuring", num_runs, "repetitions") as progress:
        timings = []
        for done in range(repeats + 1):
            timings.append(run_once(language_model, workload))
            progress.update(done + 1)
        if parts:
            by_parts = run_by_parts(language_model, workload)
            progress.update(num_runs)
    values = {
        "model": model,
        "workload": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "prefill_tokens": prefill_tokens,
            "draft": draft,
            "repeats": repeats,
        },
        **summary(workload, timings[1:]),
        "drafting": None if timings[-1].drafting is None else timings[-1].drafting._asdict(),
        "memory": {
            "peak_bytes": peak_memory(),
            "weight_bytes": language_model.weight_bytes,
            "state_bytes": timings[-1].state_bytes,
        },
        "machine": describe_machine(language_model),
        "dtype": language_model.type_name,
        "quantization": None if language_model.scheme is None else language_model.scheme.label,
        "backends": backends(language_model),
        "parts": None if by_parts is None else part_values(by_parts),
    }
    lines = table(values)
    if by_parts is not None:
        lines += part_lines(workload, by_parts)
    for line in lines:
        output.line(line)
    output.result(values)


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


def describe_machine(model: ReadableModel) -> dict[str, Any]:
    """Return what a reader needs to know to compare the numbers."""
    from importlib.metadata import version

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": num_threads(model),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def num_threads(model: ReadableModel) -> int:
    """Return how many threads this model computes with."""
    plan = model.step_plan()
    if not isinstance(plan, str):
        return plan.threads
    import torch

    return torch.get_num_threads()


def backends(model: ReadableModel) -> dict[str, str]:
    """Return which back-end runs this model: all of it, or each operation."""
    if not isinstance(model.step_plan(), str):
        return {"all layers": "native"}
    import torch

    from jamba_lm.kernels import ops
    from jamba_lm.language_model import LanguageModel

    assert isinstance(model, LanguageModel)
    like = torch.zeros(1, dtype=model.dtype)
    names = {op for module in ops.BACKENDS.values() for op in module.OPERATIONS}
    return {
        op: ops.choose(op, like, backend=model.backend).__name__.rsplit(".", 1)[-1]
        for op in sorted(names)
    }


def table(values: dict[str, Any]) -> list[str]:
    """Lay the results out for a person."""
    from jamba_lm.cli.quantities import show_bytes, show_count

    workload, memory, machine = values["workload"], values["memory"], values["machine"]
    lines = [
        f"{values['model']}: {values['quantization'] or values['dtype']}, "
        f"{show_count(machine['threads'], 'thread')}, "
        f"batch {workload['batch']}, {show_count(workload['repeats'], 'repetition')}",
        f"{'tokens/s':<14}{'median':>12}{'min':>12}{'max':>12}",
    ]
    for name, count in (("prefill", "prompt_tokens"), ("decode", "new_tokens")):
        rates = values[f"{name}_tokens_per_second"]
        label = f"{name} {workload[count]:,}"
        lines.append(
            f"{label:<14}" + "".join(f"{rates[key]:>12,.1f}" for key in ("median", "min", "max"))
        )
    if values["drafting"] is not None:
        counts = values["drafting"]
        lines.append(
            f"{counts['accepted']:,} of {counts['proposed']:,} drafted tokens accepted, "
            f"{show_count(workload['new_tokens'] * workload['batch'], 'token')} in "
            f"{show_count(counts['calls'], 'call')}"
        )
    lines.append(
        f"peak memory {show_bytes(memory['peak_bytes'])}, of it weights "
        f"{show_bytes(memory['weight_bytes'])} and states {show_bytes(memory['state_bytes'])}"
    )
    lines.append(", ".join(f"{op}: {name}" for op, name in values["backends"].items()))
    return lines
