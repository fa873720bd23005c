"""The options that several commands share, and how a command opens the model it was given.

Imports torch only when a model is opened that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jamba_lm.config_json import shown
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.files import path_kind

if TYPE_CHECKING:
    from jamba_lm.cli.output import Output
    from jamba_lm.language_model import LanguageModel
    from jamba_lm.readable_model import ReadableModel

# The name that stands for the model inside the package.
EMBEDDED = "demo"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"A checkpoint folder, a .gguf file, or '{EMBEDDED}', the small model in the package.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads to compute with; all cores when left out.", show_default=False),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="Kernel back-end: native or reference; the fastest that can when left out.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(help="Type of the weights: auto keeps the file's; fp32, bf16, fp16."),
]

QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="Pack the weights while they are read: experts-int8, int8, experts-int4 or int4. "
        "`jamba quantize` does it once for all.",
        show_default=False,
    ),
]

AdapterOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="An adapter in PEFT's format, added to the weights when they are read.",
        show_default=False,
    ),
]


def named_path(name: str) -> Path:
    """Return the path that MODEL or TOKENIZER names, whether or not something is there."""
    if name != EMBEDDED:
        return Path(name)
    from jamba_lm.presets import embedded_model_path

    return embedded_model_path()


def model_folder(model: str) -> Path:
    """Return the folder that MODEL names.

    Raises:
        CheckpointError: there is nothing.
    """
    folder = named_path(model)
    if path_kind(folder) == "missing":
        raise CheckpointError(
            f"no model at {shown(model)}: expected a checkpoint folder, a .gguf file, or "
            f"'{EMBEDDED}' for the small model inside the package"
        )
    return folder


def use_threads(threads: int | None) -> None:
    """Compute with this many CPU threads.

    Raises:
        InputError: fewer than one, or more than any machine has.
    """
    _check_threads(threads)
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"--threads is {threads}: expected a number of CPU threads from 1 to 1024")


def open_model(
    model: str,
    dtype: str,
    backend: str | None,
    threads: int | None,
    quantize: str | None = None,
    adapter: Path | None = None,
) -> LanguageModel:
    """Load the model that MODEL names, to compute as the shared options say."""
    from jamba_lm.language_model import load

    use_threads(threads)
    return load(
        model_folder(model), dtype=dtype, backend=backend, quantize=quantize, adapter=adapter
    )


def open_readable(
    model: str,
    dtype: str,
    backend: str | None,
    threads: int | None,
    quantize: str | None = None,
    adapter: Path | None = None,
) -> ReadableModel:
    """Load the model that MODEL names to generate text with it, as fast as that can be.

    Without torch, whose import takes longer than all else, where nothing that was asked for and
    nothing about the checkpoint needs it.
    """
    _check_threads(threads)
    if dtype == "auto" and quantize is None and adapter is None:
        from jamba_lm.native_model import open_native

        found = open_native(model_folder(model), backend=backend, threads=threads)
        if not isinstance(found, str):
            return found
    return open_model(model, dtype, backend, threads, quantize, adapter)


def note_slow_type(output: Output, model: ReadableModel, backend: str | None) -> None:
    """Say so when nothing but its type keeps a model from being read by native calls."""
    from jamba_lm.kernels.choice import requested_backend

    if model.type_name == "float16" and (backend or requested_backend()) is None:
        output.note(
            "note: this model is in fp16, which no native call reads: --dtype bf16 or fp32 is many "
            "times faster"
        )
