"""`jamba convert`: a model from Hugging Face's folder to a GGUF file, or back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import EMBEDDED, JsonOption, model_folder
from jamba_lm.errors import InputError
from jamba_lm.gguf_file import SUFFIX, is_gguf


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help=f"A checkpoint folder, '{EMBEDDED}', or a {SUFFIX} file.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help=f"A {SUFFIX} file, or a folder in Hugging Face's layout, to make of it.",
            show_default=False,
        ),
    ],
    file_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help=f"Type of the matrices in a {SUFFIX} file: f32, f16, bf16, q8_0 or q4_0; bf16 "
            "when left out.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights in a folder: fp32, bf16 or fp16; those they have, or bf16 "
            "for a quantised file, when left out.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        bool,
        typer.Option(
            "--tokenizer/--no-tokenizer",
            help=f"Take the tokenizer along; without, a {SUFFIX} file takes token ids only.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at TARGET already.")
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Convert a model between Hugging Face's layout and GGUF, the format of llama.cpp.

    Weights, tokenizer and chat template are converted, one tensor at a time; of a quantised folder
    what its matrices stand for. TARGET appears when it is complete, or not at all.
    """
    from jamba_lm.cli.output import Output
    from jamba_lm.conversion import folder_to_folder, folder_to_gguf, gguf_to_folder

    origin = model_folder(source)
    to_gguf = target.suffix.lower() == SUFFIX
    if to_gguf and is_gguf(origin):
        raise InputError(
            f"TARGET is {str(target)!r}: expected a folder, as SOURCE is a {SUFFIX} file"
        )
    if to_gguf and dtype is not None:
        raise InputError(f"--dtype is for folders: choose the type of a {SUFFIX} file with --type")
    if not to_gguf and file_type is not None:
        raise InputError(f"--type is for {SUFFIX} files: choose the type of a folder with --dtype")
    if not to_gguf and not tokenizer:
        raise InputError(f"--no-tokenizer is for {SUFFIX} files: delete tokenizer.json instead")
    output = Output(json_wanted)
    started = time.monotonic()
    with output.progress(f"writing {target}", 0, "bytes") as line:

        def show(done: int, total: int) -> None:
            line.update(done, total=total)

        if to_gguf:
            converted = folder_to_gguf(
                origin,
                target,
                file_type=file_type or "bf16",
                name="jamba-lm-demo" if source == EMBEDDED else None,
                tokenizer=tokenizer,
                overwrite=overwrite,
                progress=show,
            )
        else:
            to_folder = gguf_to_folder if is_gguf(origin) else folder_to_folder
            converted = to_folder(
                origin, target, dtype=dtype or "auto", overwrite=overwrite, progress=show
            )
    seconds = time.monotonic() - started
    for note in converted.notes:
        output.note(f"note: {note}")
    stored = ", ".join(f"{count:,} {name}" for name, count in converted.values_by_type.items())
    output.line(
        f"wrote {stored} weights, {converted.num_bytes:,} bytes, into {target} in {seconds:.1f} s; "
        f"tokenizer: {converted.tokenizer}"
    )
    output.result(
        {
            "source": source,
            "target": str(target),
            "bytes": converted.num_bytes,
            "values_by_type": dict(converted.values_by_type),
            "tokenizer": converted.tokenizer,
            "notes": list(converted.notes),
            "seconds": seconds,
        }
    )
