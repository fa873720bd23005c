"""`jamba init`: write a random checkpoint of any shape."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import JsonOption


def init(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="A preset's name, or a folder or file with a config.json.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a field of the config, like d_ff=128; may be given many times.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type to store: fp32, bf16 or fp16.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    shard_bytes: Annotated[
        int, typer.Option(help="Largest weight file, in bytes.")
    ] = 5_000_000_000,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already in DIR.")
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Write a checkpoint with random weights, one tensor at a time.

    The weights are those that training from scratch starts from: the same for the same config,
    type and seed. DIR appears when it is complete, or not at all.
    """
    from jamba_lm.analysis.memory import parameter_counts
    from jamba_lm.checkpoint.random_init import write_random_checkpoint
    from jamba_lm.cli.output import Output
    from jamba_lm.config import JambaConfig
    from jamba_lm.presets import preset as find_preset

    named_by_path = "/" in preset or Path(preset).exists()
    config = JambaConfig.load(preset) if named_by_path else find_preset(preset)
    config = config.with_set(changes or [])
    output = Output(json_wanted)
    started = time.monotonic()
    with output.progress(f"writing {out}", 0, "bytes") as line:
        num_bytes = write_random_checkpoint(
            out,
            config,
            dtype=dtype,
            seed=seed,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            progress=lambda done, total: line.update(done, total=total),
        )
    seconds = time.monotonic() - started
    parameters = parameter_counts(config).total
    output.line(
        f"wrote {parameters:,} parameters, {num_bytes:,} bytes, into {out} in {seconds:.1f} s"
    )
    output.result(
        {
            "folder": str(out),
            "config": config.to_dict(),
            "parameters": parameters,
            "bytes": num_bytes,
            "dtype": dtype,
            "seed": seed,
            "seconds": seconds,
        }
    )
