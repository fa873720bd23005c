"""`jamba plan train`: memory, arithmetic, communication and days of a training run, before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jamba_lm.cli.options import JsonOption, ThreadsOption, use_threads
from jamba_lm.cli.output import Output
from jamba_lm.cli.quantities import parse_bytes, parse_run_tokens, parse_tokens
from jamba_lm.cli.shapes import SetOption, ShapeArgument, open_shape
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.parallel_layout import ParallelLayout

if TYPE_CHECKING:
    from jamba_lm.analysis.training_cost.plan import Run

MOST_GPUS = 2**20
# What the recipes of small models have: a step of a few thousand tokens, in sequences of 512.
LOCAL_BATCH_TOKENS, LOCAL_SEQUENCE = 8192, "512"


def plan_train(
    model: ShapeArgument,
    tokens: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Tokens of the whole run: 300B (of 10^9), 1.5T (of 10^12) or plain.",
            show_default=False,
        ),
    ],
    gpus: Annotated[
        int | None, typer.Option(help="Devices in all; 1 when left out.", show_default=False)
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each device: 80GiB, 80GB. 80GiB when left out.",
            show_default=False,
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Ranks along each axis, like shard=8,tensor=8,expert=16,sequence=true; the axes "
            "are replicate, shard, context, tensor, expert and sequence. The fastest that fits is "
            "looked for when left out.",
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens of one optimizer step: 4M is 4 x 1024^2. 4M when left out; about 8K with "
            "--this-machine.",
            show_default=False,
        ),
    ] = None,
    sequence_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens of each sequence. 4K when left out; 512 with --this-machine.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device by name, with its data sheet: h100, which it is when left out.",
            show_default=False,
        ),
    ] = None,
    this_machine: Annotated[
        bool,
        typer.Option(
            "--this-machine",
            help="Plan for the processor here, a worker on each thread: measures the operations of "
            "a step, which takes up to minutes.",
        ),
    ] = False,
    threads: ThreadsOption = None,
    sets: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say whether a training run fits on a mesh of devices, how fast it is, and why.

    Weights, gradients and moments are exact; activations are what our own layers keep, tensor by
    tensor. Times follow from the numbers that are printed below them, each with where it is from.
    """
    from jamba_lm.analysis.training_cost.devices import device_named
    from jamba_lm.analysis.training_cost.mesh import parse_mesh
    from jamba_lm.analysis.training_cost.plan import Run, best_on, search
    from jamba_lm.cli.training_plan_table import describe, plan_values

    config, _ = open_shape(model, sets)
    output = Output(json)
    run_tokens = parse_run_tokens(tokens, "--tokens")
    if this_machine:
        refused = {"--gpus": gpus, "--mesh": mesh, "--device": device}
        for option, value in refused.items():
            if value is not None:
                raise InputError(f"{option} is of other devices: leave it out with --this-machine")
        run = _local_run(config, run_tokens, gpu_memory, batch_tokens, sequence_tokens, threads)
        output.note("measuring the operations of a step here, one at a time")
        name, found = "this machine", best_on(run, ParallelLayout())
    else:
        if threads is not None:
            raise InputError("--threads is of the processor here: give it with --this-machine")
        number = 1 if gpus is None else gpus
        if not 1 <= number <= MOST_GPUS:
            raise InputError(f"--gpus is {number}: expected 1 or more devices, up to {MOST_GPUS:,}")
        name = device or "h100"
        run = Run(
            config=config,
            device=device_named(name),
            gpus=number,
            gpu_memory=parse_bytes(gpu_memory or "80GiB", "--gpu-memory"),
            tokens=run_tokens,
            batch_tokens=parse_tokens(batch_tokens or "4M", "--batch-tokens"),
            sequence_tokens=parse_tokens(sequence_tokens or "4K", "--sequence-tokens"),
        )
        found = search(run) if mesh is None else best_on(run, parse_mesh(mesh))
    for line in describe(model, name, found, searched=mesh is None):
        output.line(line)
    output.result(plan_values(model, name, found))


def _local_run(
    config: JambaConfig,
    tokens: int,
    memory: str | None,
    batch_tokens: str | None,
    sequence_tokens: str | None,
    threads: int | None,
) -> Run:
    """Return a run of this processor, whose cores each work on a pass of their own."""
    import torch

    from jamba_lm.analysis.machine import usable_memory
    from jamba_lm.analysis.training_cost.plan import Run
    from jamba_lm.training.operation_speed import MeasuredMachine

    use_threads(threads)
    workers = torch.get_num_threads()
    sequence = parse_tokens(sequence_tokens or LOCAL_SEQUENCE, "--sequence-tokens")
    if batch_tokens is None:
        together = workers * sequence
        batch = -(-LOCAL_BATCH_TOKENS // together) * together
    else:
        batch = parse_tokens(batch_tokens, "--batch-tokens")
    return Run(
        config=config,
        device=MeasuredMachine(workers),
        gpus=1,
        gpu_memory=usable_memory() if memory is None else parse_bytes(memory, "--gpu-memory"),
        tokens=tokens,
        batch_tokens=batch,
        sequence_tokens=sequence,
    )
