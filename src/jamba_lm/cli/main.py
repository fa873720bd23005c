"""The `jamba` command: the list of its commands, and what becomes of an error.

Importing this must stay cheap: each command imports what it needs when it runs.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

from jamba_lm import __version__
from jamba_lm.cli.adapter import app as adapter_app
from jamba_lm.cli.bench import bench
from jamba_lm.cli.chat import chat
from jamba_lm.cli.convert import convert
from jamba_lm.cli.data import app as data_app
from jamba_lm.cli.doctor import doctor
from jamba_lm.cli.finetune import finetune
from jamba_lm.cli.generate import generate
from jamba_lm.cli.init import init
from jamba_lm.cli.inspect import inspect
from jamba_lm.cli.plan import app as plan_app
from jamba_lm.cli.quantize import quantize
from jamba_lm.cli.score import score
from jamba_lm.cli.tokenizer import app as tokenizer_app
from jamba_lm.cli.train import app as train_app
from jamba_lm.errors import JambaError

app = typer.Typer(
    name="jamba",
    help="Run, train, serve and study Jamba language models.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STATUS_WRONG_INPUT = 2
# What a shell reports of a process that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jamba {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run, train, serve and study Jamba language models."""


app.command()(inspect)
app.add_typer(plan_app, name="plan")
app.command()(doctor)
app.command()(init)
app.command()(convert)
app.command()(quantize)
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(generate)
app.command()(chat)
app.command()(score)
app.command()(bench)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.command()(finetune)
app.add_typer(adapter_app, name="adapter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    Args:
        arguments: what follows `jamba` on the command line; that of the process when None.

    Returns:
        0 when it worked, 2 when the person who asked can mend it (one `error:` line says how),
        130 after Ctrl-C, 141 when whoever read stdout went away. Anything else is a bug and
        leaves as an exception.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command = typer.main.get_command(app)
        status = command.main(given or ["--help"], prog_name="jamba", standalone_mode=False)
        sys.stdout.flush()
    except JambaError as error:
        _print_error(str(error))
        return STATUS_WRONG_INPUT
    except typer.TyperException as error:
        _print_error(error.format_message(), hint=True)
        return STATUS_WRONG_INPUT
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except (SystemExit, BrokenPipeError) as error:
        # typer turns a broken pipe into an exit of its own.
        if not isinstance(error.__context__ or error, BrokenPipeError):
            raise
        _silence(sys.stdout, sys.stderr)
        return STATUS_BROKEN_PIPE
    return status if isinstance(status, int) else 0


def _print_error(message: str, *, hint: bool = False) -> None:
    one_line = " ".join(message.split())
    more = " (`jamba --help` lists the commands, `jamba COMMAND --help` the options)"
    print(f"error: {one_line}{more if hint else ''}", file=sys.stderr)


def _silence(*streams: TextIO) -> None:
    # What is still buffered has nowhere to go, and the interpreter would complain of it at exit.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
