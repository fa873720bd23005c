"""`jamba train`: carry out a training recipe, or draw the curves of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jamba_lm.cli.default_command import unless_named
from jamba_lm.cli.options import BackendOption, JsonOption, ThreadsOption, use_threads
from jamba_lm.errors import InputError

if TYPE_CHECKING:
    from jamba_lm.cli.output import Output
    from jamba_lm.training.loop import Outcome, Resume
    from jamba_lm.training.processes import Processes
    from jamba_lm.training.recipe import Recipe

RUN = "run"
HELP = (
    "Train a model as RECIPE says (`jamba train RECIPE --out DIR`), write out its weights, or draw "
    "the curves of runs."
)
app = typer.Typer(
    cls=unless_named(RUN),
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(help=HELP)
def group() -> None:
    """Hold the commands together."""


@app.command(RUN)
def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file (TOML), or the name of one in the package.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the run.", show_default=False),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, like training.steps=100; may be given many times.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR, from its last checkpoint.")
    ] = False,
    auto: Annotated[
        bool, typer.Option("--auto", help="Go on when DIR holds a run, start one when it does not.")
    ] = False,
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Train a model as RECIPE says.

    Recipes in the package: tiny (two minutes), demo, 100m, ablation-1.3b, ablation-7b, jamba-v0.1.
    They want text: --set data.prepared=DIR, which `jamba data prepare` has written.

    Started by torchrun, all its processes train one model as [parallel] in RECIPE says.

    DIR gets the resolved recipe, a log, checkpoints, and at the end the folder model/, which
    `jamba generate DIR/model` reads. Ctrl-C saves and ends; a killed run loses what came after its
    last checkpoint, and resumed it ends with the same bits.
    """
    if resume and auto:
        raise InputError("--resume and --auto were both given: --auto resumes by itself")
    use_threads(threads)
    from jamba_lm.cli.output import Output
    from jamba_lm.training.pages import keep_freed_pages
    from jamba_lm.training.processes import FailedElsewhereError, joined
    from jamba_lm.training.recipe_file import load_recipe

    keep_freed_pages()
    output = Output(json_wanted)
    mode: Resume = "always" if resume else "auto" if auto else "never"
    try:
        with joined() as processes:
            resolved = processes.all_or_none(lambda: load_recipe(recipe, changes or []))
            outcome = _carry_out(resolved, out, mode, backend, output, processes)
    except FailedElsewhereError as error:
        # The first process has said why.
        raise typer.Exit(2) from error
    if not processes.leads:
        return
    progress, validation = outcome.progress, outcome.validation
    if outcome.finished and validation is not None:
        output.line(
            f"trained {progress.steps_done:,} steps on {progress.tokens_seen:,} tokens: "
            f"{validation.bits_per_byte:.4f} bits per byte; the model is in {outcome.model_folder}"
        )
    else:
        output.line(
            f"stopped and saved after step {progress.steps_done:,}; go on with "
            f"`jamba train {recipe} --out {out} --resume`"
        )
    output.result(
        {
            "finished": outcome.finished,
            "steps": progress.steps_done,
            "tokens": progress.tokens_seen,
            "loss": None if validation is None else validation.loss,
            "bits_per_byte": None if validation is None else validation.bits_per_byte,
            "model": None if outcome.model_folder is None else str(outcome.model_folder),
        }
    )


def _carry_out(
    recipe: Recipe,
    out: Path,
    mode: Resume,
    backend: str | None,
    output: Output,
    processes: Processes,
) -> Outcome:
    """Train, and show how far it has come."""
    from jamba_lm.analysis.machine_speed import product_speed
    from jamba_lm.checkpoint.huggingface import DTYPES
    from jamba_lm.cli.training_progress import TrainingProgress
    from jamba_lm.training.loop import train as carry_out

    peak = None
    if processes.leads and processes.device.type == "cpu":
        peak = product_speed(DTYPES[recipe.training.dtype])
    with TrainingProgress(output, recipe.training.steps) as shown:
        return carry_out(
            recipe,
            out,
            resume=mode,
            backend=backend,
            report=shown.report,
            pass_progress=shown.pass_progress,
            peak_flops=peak,
            processes=processes,
        )


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the model to write.", show_default=False),
    ],
    json_wanted: JsonOption = False,
) -> None:
    """Write the weights of a run's newest checkpoint as a Hugging Face folder.

    One process does it, a tensor at a time, whichever number of processes saved the checkpoint.
    """
    from jamba_lm.cli.output import Output
    from jamba_lm.training.export import export_newest
    from jamba_lm.training.recipe_file import load_recipe

    output = Output(json_wanted)
    step = export_newest(load_recipe(run / "recipe.toml"), run, out)
    output.line(f"the model after step {step:,} is in {out}")
    output.result({"model": str(out), "step": step})


@app.command()
def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders of runs.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Picture to write, .png, .svg or .pdf; curves.png in the first DIR when not said.",
            show_default=False,
        ),
    ] = None,
    json_wanted: JsonOption = False,
) -> None:
    """Draw loss, held-out bits per byte, gradient norm and balance of runs over their tokens."""
    from jamba_lm.cli.output import Output
    from jamba_lm.training.curves import draw, read_run, summary

    output = Output(json_wanted)
    runs = [read_run(folder) for folder in folders]
    path = folders[0] / "curves.png" if out is None else out
    draw(runs, path)
    found = [summary(run) for run in runs]
    for one in found:
        bits = one["bits_per_byte"]
        held_out = "" if bits is None else f", {bits:.4f} bits per byte held out"
        output.line(
            f"{one['run']}: {one['steps']:,} steps, {one['tokens']:,} tokens, loss "
            f"{one['loss']:.3f}{held_out}"
        )
    output.line(f"the curves are in {path}")
    output.result({"picture": str(path), "runs": found})
