"""`jamba score`: how well a model predicts a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import (
    AdapterOption,
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
    model_folder,
    open_model,
)


def score(
    model: ModelArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A UTF-8 text file.", show_default=False)
    ],
    piece_tokens: Annotated[
        int, typer.Option(help="Tokens to read at once; bounds the memory it takes.")
    ] = 256,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="Start afresh after this many tokens; the model's context length when left out.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Say how well a model predicts a text: loss per token and bits per byte.

    The text is one document and is read in pieces, so its length costs time and not memory.
    """
    from jamba_lm.cli.output import Output
    from jamba_lm.evaluation.scoring import Score, count_text_bytes, score_file
    from jamba_lm.text.tokenizer import load_tokenizer

    output = Output(json_wanted)
    num_bytes = count_text_bytes(file)
    tokenizer = load_tokenizer(model_folder(model))
    language_model = open_model(model, dtype, backend, threads, quantize, adapter)
    started = time.perf_counter()
    with output.progress("scoring", num_bytes, "bytes") as progress:

        def show(so_far: Score) -> None:
            progress.update(so_far.num_bytes, f"{so_far.bits_per_byte:.4f} bits per byte")

        result = score_file(
            language_model,
            tokenizer,
            file,
            piece_tokens=piece_tokens,
            context_tokens=context_tokens,
            on_progress=show,
        )
    seconds = time.perf_counter() - started
    output.line(
        f"{result.bits_per_byte:.4f} bits per byte, loss {result.loss:.4f} nats per token, "
        f"perplexity {result.perplexity:,.2f}"
    )
    windows = f", in {result.num_windows} windows" if result.num_windows > 1 else ""
    output.line(
        f"{result.num_bytes:,} bytes, {result.num_tokens:,} tokens{windows}, in {seconds:.1f} s "
        f"({result.num_tokens / seconds:,.0f} tokens/s)"
    )
    output.result(
        {
            "model": model,
            "file": str(file),
            "bits_per_byte": result.bits_per_byte,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "nats": result.nats,
            "bytes": result.num_bytes,
            "tokens": result.num_tokens,
            "windows": result.num_windows,
            "seconds": seconds,
        }
    )
