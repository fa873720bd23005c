"""A training plan, laid out for a person and as plain values. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from jamba_lm.analysis.training_cost.mesh import describe as describe_mesh
from jamba_lm.analysis.training_cost.plan import TrainingPlan, token_flops
from jamba_lm.cli.quantities import show_bytes

MEMORY_NAMES = {
    "parameters": "parameters, as computed with",
    "gradients": "gradients",
    "optimizer": "master weights and moments",
    "gathered": "weights gathered for layers",
    "activations": "activations",
    "logits": "a piece of logits",
    "buffers": "communication buffers",
    "reserve": "libraries and fragments",
}


def describe(model: str, device: str, plan: TrainingPlan, *, searched: bool) -> Iterator[str]:
    """Yield the lines that answer a person."""
    run, rank, workers = plan.run, plan.rank, plan.run.device.workers
    where = f"{run.gpus:,} x {device}" if workers == 1 else f"{device}, {workers} workers,"
    yield (
        f"{model} on {where} of {show_bytes(run.gpu_memory)}: {run.tokens:,} "
        f"tokens, {run.batch_tokens:,} a step, in sequences of {run.sequence_tokens:,}"
    )
    if run.device.node_size > 1:
        how = "the fastest found that fits" if searched else "as asked"
        yield f"  mesh: {describe_mesh(rank.mesh)} ({how})"
    again = "each layer is computed again in the backward pass"
    kept = "every layer keeps its activations"
    yield (
        f"  a step: {plan.time.passes:,} passes of {rank.work.sequences:,} x {rank.tokens:,} "
        f"tokens on each {'rank' if workers == 1 else 'worker'}; "
        f"{again if rank.work.recompute else kept}"
    )
    if run.device.node_size == 1:
        yield (
            f"  in a recipe: batch_tokens = {rank.rows}, accumulate = {plan.time.passes * workers}"
            f", workers = {workers}"
            f"{', recompute_layers = true' if rank.work.recompute else ''}"
        )
    yield from _memory(plan)
    yield from _time(plan)
    yield from _exchanges(plan)
    yield from _flops(plan)
    yield ""
    yield "what this rests on"
    for name, one in run.device.assumptions():
        yield f"  {name:<26}{one.value:>14.6g} {one.unit:<8} {one.origin}: {one.source}"


def _memory(plan: TrainingPlan) -> Iterator[str]:
    yield ""
    yield f"memory of {'the fullest rank' if plan.run.device.workers == 1 else 'all workers'}"
    for one in fields(plan.memory):
        count = getattr(plan.memory, one.name)
        if count:
            yield f"  {MEMORY_NAMES[one.name]:<30}{show_bytes(count):>12}{count:22,}"
        if one.name == "activations":
            for part, num_bytes in plan.activations.by_part.items():
                yield f"    {part:<28}{show_bytes(num_bytes):>12}{num_bytes:22,}"
    yield f"  {'all':<30}{show_bytes(plan.memory.total):>12}{plan.memory.total:22,}"
    spare = plan.run.gpu_memory - plan.memory.total
    yield f"  {'to spare':<30}{show_bytes(spare):>12}{spare:22,}"


def _time(plan: TrainingPlan) -> Iterator[str]:
    time = plan.time
    yield ""
    yield f"{'seconds of a step':<28}{'forward':>10}{'backward':>10}{'share':>9}"
    for part, forward in time.forward.items():
        backward = time.backward[part]
        yield f"  {part:<26}{forward:10.4f}{backward:10.4f}{_share(forward + backward, plan)}"
    if time.again:
        yield f"  {'layers once more':<26}{'':10}{time.again:10.4f}{_share(time.again, plan)}"
    for purpose, seconds in time.waiting.items():
        yield f"  {f'waiting: {purpose}':<36}{seconds:10.4f}{_share(seconds, plan)}"
    yield f"  {'optimizer':<36}{time.optimizer:10.4f}{_share(time.optimizer, plan)}"
    yield f"  {'not accounted for':<36}{time.others:10.4f}{_share(time.others, plan)}"
    yield f"  {'all':<36}{time.seconds:10.4f}{_share(time.seconds, plan)}"
    yield ""
    yield (
        f"{time.tokens_per_second:,.0f} tokens/s, {time.tokens_per_second / plan.run.gpus:,.0f} a "
        f"device; MFU {100 * plan.mfu:.1f} %; {_duration(plan.days)}"
    )


def _duration(days: float) -> str:
    """Write a time in the unit that has two figures of it or more.

    >>> _duration(24.6), _duration(0.25), _duration(0.005)
    ('24.6 days', '6.0 hours', '7.2 minutes')
    """
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{1440 * days:.1f} minutes"


def _share(seconds: float, plan: TrainingPlan) -> str:
    return f"{100 * seconds / plan.time.seconds:7.1f} %"


def _exchanges(plan: TrainingPlan) -> Iterator[str]:
    if not plan.time.exchanges:
        return
    yield ""
    yield (
        f"{'exchanges':<46}{'ranks':>5}{'bytes each':>14}{'times':>8}{'seconds':>10}  "
        "(those of weights and gradients hide behind computing)"
    )
    passes = plan.time.passes
    for one, seconds in plan.time.exchanges:
        times = 1 if one.purpose == "replicas" else passes
        label = f"{one.purpose}: {one.name}, {one.pattern}"
        yield (
            f"  {label:<44}{one.group.size:>5}{one.num_bytes:>14,}"
            f"{times * one.count:>8,.0f}{times * seconds:>10.4f}"
        )


def _flops(plan: TrainingPlan) -> Iterator[str]:
    yield ""
    yield f"{'operations of a token':<28}{'forward':>17}{'backward':>17}{'computed again':>17}"
    for part, flops in token_flops(plan.run).items():
        again = flops.again
        if plan.rank.work.recompute and part != "head":
            again += flops.forward
        yield f"  {part:<26}{flops.forward:17,.0f}{flops.backward:17,.0f}{again:17,.0f}"


def plan_values(model: str, device: str, plan: TrainingPlan) -> dict[str, Any]:
    """Return what `--json` prints: bytes, seconds and operations."""
    run, rank, time = plan.run, plan.rank, plan.time
    return {
        "model": model,
        "device": device,
        "gpus": run.gpus,
        "workers": run.device.workers,
        "gpu_memory": run.gpu_memory,
        "tokens": run.tokens,
        "batch_tokens": run.batch_tokens,
        "sequence_tokens": run.sequence_tokens,
        "mesh": asdict(rank.mesh),
        "pass": {**asdict(rank.work), "passes": time.passes},
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "activations": dict(plan.activations.by_part),
        "seconds": {
            "forward": dict(time.forward),
            "backward": dict(time.backward),
            "again": time.again,
            "waiting": dict(time.waiting),
            "optimizer": time.optimizer,
            "others": time.others,
            "step": time.seconds,
        },
        "exchanges": [
            {**asdict(one), "wire_bytes": one.wire_bytes, "seconds": seconds}
            for one, seconds in time.exchanges
        ],
        "flops_per_token": {part: asdict(one) for part, one in token_flops(run).items()},
        "tokens_per_second": time.tokens_per_second,
        "mfu": plan.mfu,
        "days": plan.days,
        "assumptions": {name: asdict(one) for name, one in run.device.assumptions()},
    }
