"""`jamba tokenizer`: train a tokenizer, look at what one does, measure it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.cli.options import JsonOption, named_path
from jamba_lm.cli.output import Output
from jamba_lm.cli.prompt import LIMIT_BYTES
from jamba_lm.errors import InputError

if TYPE_CHECKING:
    from jamba_lm.text.tokenizer_report import TextMeasure

HELP = "Train a tokenizer, encode and decode with one, measure it."
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

TokenizerArgument = Annotated[
    str,
    typer.Argument(
        metavar="TOKENIZER",
        help="A folder with tokenizer.json, the file itself, or 'demo'.",
        show_default=False,
    ),
]
FieldOption = Annotated[str, typer.Option(help="Key of the text in .jsonl files.")]


@app.callback(help=HELP)
def group() -> None:
    """Hold the commands together."""


@app.command()
def train(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...", help="UTF-8 text files, or .jsonl files.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to write; must not exist yet.", show_default=False)
    ],
    vocab: Annotated[int, typer.Option(help="Entries, special tokens and bytes included.")] = 65536,
    kind: Annotated[
        str, typer.Option(help="byte-level, or byte-fallback as SentencePiece does.")
    ] = "byte-level",
    special: Annotated[
        list[str] | None,
        typer.Option(
            help="One more token to reserve, such as '<think>'; may be given again.",
            show_default=False,
        ),
    ] = None,
    field: FieldOption = "text",
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to measure on; may be given again. When left out, one piece in 50 of FILES "
            "is kept out of training.",
            show_default=False,
        ),
    ] = None,
    json_wanted: JsonOption = False,
) -> None:
    """Train a tokenizer of the paper's kind: BPE over all text, every digit on its own."""
    from jamba_lm.text.corpus import total_bytes
    from jamba_lm.text.tokenizer import load_tokenizer
    from jamba_lm.text.tokenizer_report import measure_text
    from jamba_lm.text.tokenizer_training import TokenizerRecipe, train_tokenizer

    output = Output(json_wanted)
    recipe = TokenizerRecipe(
        vocab_size=vocab, kind=kind, specials=tuple(special or ()), field=field
    )
    with output.progress("reading", total_bytes(files), "bytes") as progress:
        trained = train_tokenizer(
            files,
            out,
            recipe,
            hold_out=not held_out,
            progress=lambda done, _total: progress.update(done),
        )
    output.line(
        f"wrote {out}: {trained.vocab_size:,} entries, {kind}, learned from "
        f"{trained.num_characters:,} characters in {trained.seconds:.1f} s"
    )
    result: dict[str, Any] = {
        "tokenizer": str(out),
        "kind": kind,
        "vocab_size": trained.vocab_size,
        "characters": trained.num_characters,
        "seconds": trained.seconds,
        "held_out": None,
    }
    pieces = _pieces(held_out, field) if held_out else iter(trained.held_out)
    if held_out or trained.held_out:
        measure = measure_text(load_tokenizer(out), pieces)
        _show(output, "held-out text", measure)
        result["held_out"] = _numbers(measure)
    else:
        output.note("too little text to keep any out of training: measure with --held-out FILE")
    output.result(result)


@app.command()
def encode(
    tokenizer: TokenizerArgument,
    text: Annotated[
        str | None,
        typer.Argument(help="The text; standard input when left out.", show_default=False),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Put the BOS in front, or not; as the tokenizer's files say when left out.",
            show_default=False,
        ),
    ] = None,
    special: Annotated[
        bool,
        typer.Option("--special", help="Let names such as <|im_end|> in the text become tokens."),
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Print the token ids of a text, and what each token stands for."""
    from jamba_lm.text.tokenizer import load_tokenizer

    output = Output(json_wanted)
    loaded = load_tokenizer(named_path(tokenizer))
    ids = loaded.encode(_given(text), add_bos=bos, allow_special=special)
    names = [loaded.token_name(one) or "" for one in ids]
    output.line(" ".join(map(str, ids)))
    output.note(" ".join(names))
    output.result({"ids": ids, "tokens": names})


@app.command()
def decode(
    tokenizer: TokenizerArgument,
    ids: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="[IDS]...", help="Token ids; standard input when left out.", show_default=False
        ),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Write BOS, EOS and the like, too.")
    ] = False,
    json_wanted: JsonOption = False,
) -> None:
    """Print the text of token ids."""
    from jamba_lm.text.tokenizer import load_tokenizer

    output = Output(json_wanted)
    loaded = load_tokenizer(named_path(tokenizer))
    if ids is None:
        words = _given(None).split()
        for word in words:
            if not (word.isascii() and word.isdigit() and len(word) < 10):
                raise InputError(f"{word!r:.40} is no token id: expected numbers between spaces")
        ids = [int(word) for word in words]
    text = loaded.decode(ids, skip_special=not special)
    output.line(text)
    output.result({"text": text})


@app.command()
def report(
    tokenizer: TokenizerArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...", help="UTF-8 text files, or .jsonl files.", show_default=False
        ),
    ],
    field: FieldOption = "text",
    json_wanted: JsonOption = False,
) -> None:
    """Measure a tokenizer on text: bytes per token, digits on their own, exact round trip."""
    from jamba_lm.text.tokenizer import load_tokenizer
    from jamba_lm.text.tokenizer_report import measure_text

    output = Output(json_wanted)
    loaded = load_tokenizer(named_path(tokenizer))
    measure = measure_text(loaded, _pieces(files, field))
    eos = ", ".join(f"{one} {loaded.token_name(one) or '?'}" for one in loaded.eos_ids) or "none"
    bos = "none" if loaded.bos_id is None else f"{loaded.bos_id} {loaded.token_name(loaded.bos_id)}"
    output.line(f"vocabulary: {loaded.vocab_size:,} ids; BOS {bos}; EOS {eos}")
    for note in loaded.contradictions:
        output.line(f"contradiction: {note}")
    _show(output, ", ".join(map(str, files)), measure)
    output.result(
        {
            "tokenizer": tokenizer,
            "vocab_size": loaded.vocab_size,
            "bos_id": loaded.bos_id,
            "eos_ids": list(loaded.eos_ids),
            "contradictions": list(loaded.contradictions),
            **_numbers(measure),
        }
    )


def _pieces(files: list[Path], field: str) -> Iterator[str]:
    from jamba_lm.text.corpus import read_pieces

    for path in files:
        for text, _ in read_pieces(path, field=field):
            yield text


def _given(text: str | None) -> str:
    """Return the text of the command line, or standard input."""
    if text is not None:
        return text
    data = sys.stdin.buffer.read(LIMIT_BYTES + 1)
    if len(data) > LIMIT_BYTES:
        raise InputError(f"standard input is longer than {LIMIT_BYTES:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8: byte {error.start:,} is 0x{data[error.start]:02x}"
        ) from error


def _show(output: Output, name: str, measure: TextMeasure) -> None:
    output.line(
        f"{name}: {measure.num_bytes:,} bytes, {measure.num_tokens:,} tokens "
        f"({measure.distinct_tokens:,} different), {measure.bytes_per_token:.3f} bytes per token"
    )
    if measure.digits_split is not None:
        output.line(
            f"digits that are a token of their own: {100 * measure.digits_split:.2f} % of "
            f"{measure.num_digits:,}"
        )
    output.line(
        f"round trip: {measure.num_pieces - measure.num_changed:,} of {measure.num_pieces:,} "
        "pieces exact"
    )


def _numbers(measure: TextMeasure) -> dict[str, Any]:
    return {
        "bytes": measure.num_bytes,
        "tokens": measure.num_tokens,
        "distinct_tokens": measure.distinct_tokens,
        "bytes_per_token": measure.bytes_per_token,
        "digits": measure.num_digits,
        "digits_split": measure.digits_split,
        "pieces": measure.num_pieces,
        "pieces_changed": measure.num_changed,
    }
