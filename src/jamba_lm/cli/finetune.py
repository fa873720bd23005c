"""`jamba finetune`: go on training a finished model, all of it or an adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.cli.options import BackendOption, JsonOption, ThreadsOption, use_threads
from jamba_lm.errors import InputError

if TYPE_CHECKING:
    from jamba_lm.cli.output import Output
    from jamba_lm.finetuning.tuning import Prepared

UNREACHED_SHOWN = 3


def finetune(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A recipe file (TOML).", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the run.", show_default=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, like adapter.rank=16; may be given many times.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read and try everything, show it, and train nothing."),
    ] = False,
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
    """Fine-tune a model as RECIPE says: all of its weights, or an adapter (LoRA).

    Shows first what of the model is trained, and refuses an adapter that would get no gradient. DIR
    gets the resolved recipe, a log, checkpoints, and at the end adapter/ (in PEFT's format) or
    model/. Ctrl-C saves and ends.
    """
    from jamba_lm.cli.output import Output
    from jamba_lm.finetuning.recipe_file import load_tuning_recipe

    if resume and auto:
        raise InputError("--resume and --auto were both given: --auto resumes by itself")
    if dry_run == (out is not None):
        raise InputError(
            "--dry-run writes nothing: leave out --out"
            if dry_run
            else "no --out: give a folder for the run, or --dry-run to see what it would train"
        )
    resolved = load_tuning_recipe(recipe, changes or [])
    use_threads(threads)
    from jamba_lm.analysis.machine_speed import product_speed
    from jamba_lm.checkpoint.huggingface import DTYPES
    from jamba_lm.cli.training_progress import TrainingProgress
    from jamba_lm.finetuning.tuning import Tuning
    from jamba_lm.finetuning.tuning import finetune as carry_out
    from jamba_lm.training.loop import Resume
    from jamba_lm.training.pages import keep_freed_pages

    keep_freed_pages()
    output = Output(json_wanted)
    tuning = Tuning(resolved, backend)
    described = describe(tuning.prepared, output)
    if out is None:
        output.result(described)
        return
    mode: Resume = "always" if resume else "auto" if auto else "never"
    with TrainingProgress(output, resolved.training.steps) as shown:
        outcome = carry_out(
            resolved,
            out,
            tuning,
            resume=mode,
            backend=backend,
            report=shown.report,
            pass_progress=shown.pass_progress,
            peak_flops=product_speed(DTYPES[resolved.training.dtype]),
        )
    progress, validation = outcome.progress, outcome.validation
    if outcome.finished and validation is not None:
        output.line(
            f"tuned {progress.steps_done:,} steps on {progress.tokens_seen:,} tokens: held-out "
            f"loss {validation.loss:.4f}; the {tuning.output} is in {outcome.model_folder}"
        )
    else:
        output.line(
            f"stopped and saved after step {progress.steps_done:,}; go on with "
            f"`jamba finetune {recipe} --out {out} --resume`"
        )
    output.result(
        {
            **described,
            "finished": outcome.finished,
            "steps": progress.steps_done,
            "tokens": progress.tokens_seen,
            "loss": None if validation is None else validation.loss,
            "output": None if outcome.model_folder is None else str(outcome.model_folder),
        }
    )


def describe(prepared: Prepared, output: Output) -> dict[str, Any]:
    """Show what is trained and on what, and return it as JSON keeps it."""
    output.line(
        f"{'part':34}{'layers':>9}{'matrices':>13}{'values':>15}{'trained':>13}{'share':>9}"
    )
    parts = []
    for share in prepared.shares:
        layers, tensors = [len(some) for some in share.layers], share.tensors
        part = 100 * share.trained / share.values[0]
        output.line(
            f"{share.part:34}{f'{layers[1]}/{layers[0]}':>9}{f'{tensors[1]:,}/{tensors[0]:,}':>13}"
            f"{share.values[0]:>15,}{share.trained:>13,}{part:>8.2f}%"
        )
        parts.append(
            {
                "part": share.part,
                "layers": {"trained": layers[1], "all": layers[0]},
                "weights": {"trained": tensors[1], "all": tensors[0]},
                "values": share.values[0],
                "trained": share.trained,
            }
        )
    whole = 100 * prepared.trained / prepared.total
    output.line(f"{'all':34}{'':22}{prepared.total:>15,}{prepared.trained:>13,}{whole:>8.2f}%")
    sides = prepared.text.record()
    for side, values in sides.items():
        records = ", ".join(f"{count:,} {kind}" for kind, count in values["records"].items())
        output.line(
            f"{side}: {records}; {values['examples']:,} examples, {values['tokens']:,} tokens, "
            f"{values['learned_tokens']:,} of them learned"
        )
    unreached = prepared.tried.unreached if prepared.tried else []
    if prepared.tried is not None:
        output.line(f"{prepared.tried.reached} adapters got a gradient from the first batch")
    if unreached:
        names = ", ".join(unreached[:UNREACHED_SHOWN])
        output.note(
            f"{len(unreached)} adapters are in experts that nothing learned in the first batch "
            f"went through: {names}{', ...' if len(unreached) > UNREACHED_SHOWN else ''}"
        )
    return {
        "parts": parts,
        "values": prepared.total,
        "trained": prepared.trained,
        "data": sides,
        "unreached": list(unreached),
    }
