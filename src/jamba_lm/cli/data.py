"""`jamba data`: prepare a corpus to train on, and look at one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.cli.options import JsonOption
from jamba_lm.cli.output import Output

if TYPE_CHECKING:
    from jamba_lm.corpus.prepared import PreparedCorpus

HELP = "Prepare a corpus to train on: filter, remove duplicates, split, tokenize."
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback(help=HELP)
def group() -> None:
    """Hold the commands together."""


@app.command()
def prepare(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file (TOML), or a folder of documents to take with the defaults.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the corpus.", show_default=False)
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, like execution.workers=4; may be given many times.",
            show_default=False,
        ),
    ] = None,
    json_wanted: JsonOption = False,
) -> None:
    """Prepare a corpus as RECIPE says.

    DIR gets shards of tokens, the tokenizer, and report.html, which says what was dropped and why.
    The same command goes on where a stopped one was, and does nothing when all is done.
    """
    from jamba_lm.cli.output import Progress
    from jamba_lm.corpus.preparation import prepare as carry_out
    from jamba_lm.corpus.recipe_file import load_corpus_recipe

    output = Output(json_wanted)
    resolved = load_corpus_recipe(recipe, changes or [])
    with ExitStack() as stack:
        lines: dict[str, Progress] = {}

        def watch(phase: str, done: int, total: int, unit: str) -> None:
            if phase not in lines:
                lines[phase] = stack.enter_context(output.progress(phase, total, unit))
            lines[phase].update(done)

        outcome = carry_out(resolved, out, watch)
    if outcome.corpus is None:
        output.line(
            f"submitted; the corpus is in {out} when the jobs have run, and the same command says "
            "whether they have"
        )
        output.result({"finished": False, "corpus": str(out)})
        return
    if outcome.already_done:
        output.note(f"{out} was prepared before, from the same recipe and files")
    _show(output, outcome.corpus)
    output.line(f"what was dropped and why: {out / 'report.html'}")


@app.command()
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that `jamba data prepare` wrote.", show_default=False
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte and compare it with what was written."),
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Print what a prepared corpus holds and what was dropped on the way."""
    from jamba_lm.corpus.prepared import PreparedCorpus

    output = Output(json_wanted)
    corpus = PreparedCorpus(folder)
    if verify:
        output.note(f"{corpus.verify():,} bytes are what was written")
    _show(output, corpus)


def _show(output: Output, corpus: PreparedCorpus) -> None:
    from jamba_lm.corpus.report import REPORT_JSON
    from jamba_lm.errors import DataError
    from jamba_lm.files import read_json

    report = read_json(corpus.folder / REPORT_JSON, "report", DataError, 2**30)
    for source in report["sources"]:
        result = source["result"]
        learned, held_out = result["train"], result["validation"]
        output.line(
            f"{source['name']}: {learned['documents']:,} documents with {learned['tokens']:,} "
            f"tokens to train on, {held_out['documents']:,} with {held_out['tokens']:,} held out"
        )
        for stage in source["stages"][:-1]:
            line = _losses(stage)
            if line:
                output.line(f"  {stage['stage']}: {line}")
        if source["weight"] and not result["train"]["tokens"]:
            output.note(
                f"warning: nothing of {source['name']} is left to train on; its weight must be 0 "
                "in training"
            )
    total = report["total"]
    output.line(
        f"all: {total['train']['tokens']:,} tokens of {total['train']['text_bytes']:,} bytes to "
        f"train on, {total['validation']['tokens']:,} held out"
    )
    output.result(
        {
            "finished": True,
            "corpus": str(corpus.folder),
            "fingerprint": corpus.fingerprint,
            "total": total,
            "sources": [
                {
                    "name": source["name"],
                    "weight": source["weight"],
                    "result": source["result"],
                    "stages": [
                        {key: value for key, value in stage.items() if key != "samples"}
                        for stage in source["stages"]
                    ],
                }
                for source in report["sources"]
            ],
        }
    )


def _losses(stage: Mapping[str, Any]) -> str:
    lost = stage["documents_in"] - stage["documents_out"]
    parts = []
    if lost:
        reasons = ", ".join(
            f"{reason} {count:,}"
            for reason, count in sorted(stage["dropped"].items(), key=lambda one: (-one[1], one[0]))
        )
        parts.append(f"{lost:,} of {stage['documents_in']:,} dropped ({reasons})")
    parts += [f"{name} {count:,}" for name, count in stage["counts"].items()]
    return "; ".join(parts)
