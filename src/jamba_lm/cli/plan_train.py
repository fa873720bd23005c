"""`jamba plan train`: memory, arithmetic, communication and days of a training run, before it."""

from __future__ import annotations

from typing import Annotated

import typer

from jamba_lm.cli.options import JsonOption
from jamba_lm.cli.output import Output
from jamba_lm.cli.quantities import parse_bytes, parse_run_tokens, parse_tokens
from jamba_lm.cli.shapes import SetOption, ShapeArgument, open_shape
from jamba_lm.errors import InputError

MOST_GPUS = 2**20


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
    gpus: Annotated[int, typer.Option(help="Devices in all.")] = 1,
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of each device: 80GiB, 80GB.")
    ] = "80GiB",
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
        str, typer.Option(metavar="TOKENS", help="Tokens of one optimizer step: 4M is 4 x 1024^2.")
    ] = "4M",
    sequence_tokens: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens of each sequence.")
    ] = "4K",
    device: Annotated[
        str, typer.Option(help="Device by name, with its data sheet: h100.")
    ] = "h100",
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
    if not 1 <= gpus <= MOST_GPUS:
        raise InputError(f"--gpus is {gpus}: expected 1 or more devices, up to {MOST_GPUS:,}")
    run = Run(
        config=config,
        device=device_named(device),
        gpus=gpus,
        gpu_memory=parse_bytes(gpu_memory, "--gpu-memory"),
        tokens=parse_run_tokens(tokens, "--tokens"),
        batch_tokens=parse_tokens(batch_tokens, "--batch-tokens"),
        sequence_tokens=parse_tokens(sequence_tokens, "--sequence-tokens"),
    )
    found = search(run) if mesh is None else best_on(run, parse_mesh(mesh))
    output = Output(json)
    for line in describe(model, device, found, searched=mesh is None):
        output.line(line)
    output.result(plan_values(model, device, found))
