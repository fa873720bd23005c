"""`jamba quantize`: write a model's weights in 8 or 4 bits."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import JsonOption, ModelArgument, ThreadsOption, model_folder, use_threads
from jamba_lm.errors import InputError
from jamba_lm.gguf_file import is_gguf


def quantize(
    model: ModelArgument,
    scheme: Annotated[
        str,
        typer.Option(
            help="experts-int8, int8, experts-int4 or int4; what each does is listed.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale in 4 bits: 64, or 32 for 8 % more bytes and a fifth "
            "less damage. 64 when left out.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Round to 4 bits what this text (plain, or .jsonl with a `text` a line) loses "
            "least by: better at the same bytes, and much slower.",
            show_default=False,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            help="How much of the text is taken, from all over it; 16,384 when left out.",
            min=1,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Type of what is not packed: auto keeps the file's; fp32, bf16, fp16."),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already in DIR.")
    ] = False,
    threads: ThreadsOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Write a copy of a model with its weights in 8 or 4 bits.

    experts-int8: experts and MLP in 8 bits. int8: all large matrices in 8 bits. experts-int4:
    experts in 4 bits, all other large matrices in 8. int4: large matrices in 4 bits; embedding,
    head and x_proj in 8. The rest, and activations, keep their type. With --calibrate what rounding
    to 4 bits does to the products of a text is made up for by the weights not yet rounded (GPTQ).
    Memory: one matrix at a time, one layer with --calibrate. Tokenizer and chat template come
    along. DIR appears when it is complete, or not at all.
    """
    from jamba_lm.analysis.packing import packed_parts
    from jamba_lm.checkpoint.packed_writer import calibrate_folder, quantize_folder
    from jamba_lm.cli.output import Output
    from jamba_lm.config import JambaConfig, read_config_json
    from jamba_lm.quantization.policy import find_scheme
    from jamba_lm.text.documents import SAMPLE_TOKENS, sample_sequences
    from jamba_lm.text.tokenizer import load_tokenizer

    chosen = find_scheme(scheme, group)
    source = model_folder(model)
    if is_gguf(source):
        raise InputError(
            f"{model} is a GGUF file: make a folder of it with `jamba convert` first, or load it "
            "with --quantize"
        )
    if calibrate is None and calibration_tokens is not None:
        raise InputError("--calibration-tokens says how much of a text: name it with --calibrate")
    use_threads(threads)
    output = Output(json_wanted)
    started = time.monotonic()
    sequences: list[list[int]] = []
    if calibrate is None:
        with output.progress(f"writing {out}", 0, "bytes") as line:
            num_bytes = quantize_folder(
                source,
                out,
                chosen,
                dtype=dtype,
                overwrite=overwrite,
                progress=lambda done, total: line.update(done, total=total),
            )
    else:
        sequences = sample_sequences(
            calibrate, load_tokenizer(source), calibration_tokens or SAMPLE_TOKENS
        )
        with output.progress("rounding", 0, "values") as line:
            num_bytes = calibrate_folder(
                source,
                out,
                chosen,
                sequences,
                dtype=dtype,
                overwrite=overwrite,
                progress=lambda done, total: line.update(done, total=total),
            )
    seconds = time.monotonic() - started
    config = JambaConfig.load(out)
    width = 4 if read_config_json(out)["dtype"] == "float32" else 2
    parts = packed_parts(config, chosen, width)
    for part in parts:
        output.line(
            f"  {part.matrices:10}  {part.kind:10}{part.values:19,} values"
            f"{part.num_bytes:19,} bytes"
        )
    bits = 8 * num_bytes / sum(part.values for part in parts)
    output.line(
        f"wrote {num_bytes:,} bytes of weights, {bits:.2f} bits a value, into {out} "
        f"in {seconds:.1f} s"
    )
    output.result(
        {
            "model": model,
            "folder": str(out),
            "quantization": chosen.to_json(),
            "parts": [asdict(part) for part in parts],
            "bytes": num_bytes,
            "bits_per_value": bits,
            "calibration_tokens": sum(map(len, sequences)),
            "seconds": seconds,
        }
    )
