"""`jamba adapter`: look into an adapter, or merge it into its model."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import JsonOption, ModelArgument, model_folder

HELP = "Look into an adapter, or merge it into the model that it was made for."
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
AdapterArgument = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="A folder with adapter_config.json and adapter_model.safetensors.",
        show_default=False,
    ),
]


@app.callback(help=HELP)
def group() -> None:
    """Hold the commands together."""


@app.command()
def inspect(
    model: ModelArgument, adapter: AdapterArgument, json_wanted: JsonOption = False
) -> None:
    """Show what ADAPTER changes in MODEL; the weights of MODEL are not read."""
    from jamba_lm.adapter_merge import config_of
    from jamba_lm.checkpoint.adapter_reader import read_adapter
    from jamba_lm.cli.output import Output

    output = Output(json_wanted)
    found = read_adapter(adapter, config_of(model_folder(model)))
    counts: Counter[tuple[str, int, float]] = Counter()
    values: Counter[tuple[str, int, float]] = Counter()
    for name, change in found.changes.items():
        kind = "experts." * (".experts." in name) + name.split(".")[-2]
        key = (kind, change.rank, change.scale)
        counts[key] += 1
        values[key] += change.num_values
    for (kind, rank, scale), count in counts.items():
        number = values[kind, rank, scale]
        output.line(
            f"{kind:20}{count:7,} matrices   rank {rank:<5} scale {scale:<8.4g}{number:13,} values"
        )
    for name in found.replaced:
        output.line(f"{name}: replaced")
    output.line(
        f"{found.num_values:,} values in all" + (f"; made for {found.base}" if found.base else "")
    )
    output.result(
        {
            "adapter": str(adapter),
            "base": found.base,
            "values": found.num_values,
            "changes": {
                name: {"rank": change.rank, "scale": change.scale, "values": change.num_values}
                for name, change in found.changes.items()
            },
            "replaced": sorted(found.replaced),
        }
    )


@app.command()
def merge(
    model: ModelArgument,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already in DIR.")
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Write MODEL with ADAPTER added to its weights, one tensor at a time.

    Sums are taken in float32 and rounded once to the type of MODEL. The tokenizer comes along. DIR
    appears when it is complete, or not at all.
    """
    from jamba_lm.adapter_merge import merge_adapter
    from jamba_lm.cli.output import Output

    output = Output(json_wanted)
    started = time.monotonic()
    with output.progress(f"writing {out}", 0, "bytes") as line:
        merged = merge_adapter(
            model_folder(model),
            adapter,
            out,
            overwrite=overwrite,
            progress=lambda done, total: line.update(done, total=total),
        )
    seconds = time.monotonic() - started
    output.line(
        f"changed {merged.changed:,} and replaced {merged.replaced:,} weights; wrote "
        f"{merged.num_bytes:,} bytes into {out} in {seconds:.1f} s"
    )
    output.result(
        {
            "model": model,
            "adapter": str(adapter),
            "folder": str(out),
            "changed": merged.changed,
            "replaced": merged.replaced,
            "bytes": merged.num_bytes,
            "seconds": seconds,
        }
    )
