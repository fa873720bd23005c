"""`jamba plan`: what a model takes in memory, and whether it fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.memory import (
    ACTIVATION_BYTES_PER_UNIT,
    WEIGHT_FORMATS,
    MemoryPlan,
    MemoryRates,
    largest_fit,
    memory_rates,
    weight_format,
)
from jamba_lm.cli.default_command import unless_named
from jamba_lm.cli.options import JsonOption
from jamba_lm.cli.output import Output
from jamba_lm.cli.plan_train import plan_train
from jamba_lm.cli.quantities import parse_bytes, parse_tokens, show_bytes
from jamba_lm.cli.shapes import (
    SetOption,
    ShapeArgument,
    gguf_contents,
    open_shape,
    stored_format,
)
from jamba_lm.cli.speed import (
    describe_prediction,
    describe_speeds,
    predict_speed,
    prediction_values,
)
from jamba_lm.errors import InputError

if TYPE_CHECKING:
    from jamba_lm.checkpoint.gguf_storage import GgufContents

MODEL = "model"
WHOLE_PROMPT = "all"
MAX_BATCH = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the plan is asked: how much is to run, and where.

    Attributes:
        chunk: most tokens of one sequence in one call; 0 to leave activations out, None for
            whole prompts.
        memory: bytes to fit into.
        memory_of: whose memory that is, for a person.
    """

    context: int
    batch: int
    weights: str
    chunk: int | None
    memory: int
    memory_of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The largest context and the largest batch that fit; None where nothing limits them."""

    context: int | None
    batch: int | None


HELP = (
    "Say what a model takes to run (`jamba plan MODEL`), or to train (`jamba plan train MODEL "
    "--gpus N --tokens T`)."
)
app = typer.Typer(
    cls=unless_named(MODEL),
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train")(plan_train)


@app.callback(help=HELP)
def group() -> None:
    """Hold the commands together."""


@app.command(MODEL)
def plan(
    model: ShapeArgument,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens per sequence, prompt and answer together: 256K is 256 x 1024. "
            "The model's own context length when left out.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"How weights are kept: {', '.join(WEIGHT_FORMATS)}. As a quantised folder has "
            "them or a GGUF file is loaded, else bf16, when left out.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory to fit into: 80GiB, 80GB. This machine's when left out.",
            show_default=False,
        ),
    ] = None,
    chunk: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Add an estimate of the activations when a prompt is read in pieces of this "
            f"many tokens, or in one call ('{WHOLE_PROMPT}').",
            show_default=False,
        ),
    ] = None,
    this_machine: Annotated[
        bool,
        typer.Option(
            "--this-machine",
            help="Predict how fast the model reads and writes here, from a few of its layers: "
            "takes some seconds.",
        ),
    ] = False,
    sets: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say how much memory a model takes, whether it fits, and how fast it will be.

    Weights, key/value cache and Mamba states are exact, but for the room that a cache may keep
    free for its next tokens (at most 4,096 of a sequence). Activations are an estimate, and are
    added only with --chunk.
    """
    config, _ = open_shape(model, sets)
    contents = gguf_contents(model)
    if weights is None:
        loaded_as = None if contents is None else contents.loaded_as
        weights = loaded_as or stored_format(model) or "bf16"
    question = Question(
        context=config.context_length if context is None else parse_tokens(context, "--context"),
        batch=_batch(batch),
        weights=weights,
        chunk=_chunk(chunk),
        memory=usable_memory() if memory is None else parse_bytes(memory, "--memory"),
        memory_of="this machine" if memory is None else "--memory",
    )
    rates = memory_rates(config, question.weights)
    answer = rates.plan(tokens=question.context, batch=question.batch, chunk=question.chunk)
    room = find_room(rates, question)
    output = Output(json)
    output.line(f"{model}, {question.batch} x {question.context:,} tokens, {weights}")
    if contents is not None:
        output.line(f"  {describe_file(contents, weights)}")
    for line in describe(question, answer, room):
        output.line(line)
    if question.context > config.context_length:
        output.note(
            f"the model was made for {config.context_length:,} tokens; nothing stops a longer "
            "context, but its quality is unknown"
        )
    values = as_values(model, question, answer, room)
    values["file"] = None if contents is None else [asdict(one) for one in contents.types]
    if this_machine:
        prediction = predict_speed(config, weights, question.batch)
        output.line()
        for line in (*describe_speeds(prediction.speeds), *describe_prediction(prediction)):
            output.line(f"  {line}")
        values["prediction"] = prediction_values(prediction)
    output.result(values)


def _batch(batch: int) -> int:
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"--batch is {batch}: expected 1 or more sequences, up to {MAX_BATCH}")
    return batch


def _chunk(text: str | None) -> int | None:
    if text is None:
        return 0
    return None if text == WHOLE_PROMPT else parse_tokens(text, "--chunk")


def find_room(rates: MemoryRates, question: Question) -> Room:
    """Find the longest context for this batch, and the largest batch for this context."""

    def for_context(tokens: int) -> int:
        return rates.plan(tokens=tokens, batch=question.batch, chunk=question.chunk).total

    def for_batch(batch: int) -> int:
        return rates.plan(tokens=question.context, batch=batch, chunk=question.chunk).total

    return Room(
        context=largest_fit(for_context, question.memory),
        batch=largest_fit(for_batch, question.memory),
    )


def describe_file(contents: GgufContents, weights: str) -> str:
    """Say how a GGUF file, which may be smaller than its model, becomes that."""
    parts = ", ".join(f"{one.values:,} values in {one.name}" for one in contents.types)
    size = show_bytes(sum(one.num_bytes for one in contents.types))
    return f"the file has {size} of weights ({parts}); loading makes {weights} of them"


def describe(question: Question, answer: MemoryPlan, room: Room) -> Iterator[str]:
    """Yield the lines that answer a person."""
    yield f"  weights: {weight_format(question.weights).description}"
    yield ""
    yield _row("weights", answer.weights)
    yield _row("key/value cache", answer.kv_cache)
    yield _row("Mamba scan states", answer.scan_states)
    yield _row("Mamba convolution states", answer.conv_states)
    yield _row("all of these, exactly", answer.exact)
    if answer.activations:
        yield _row("activations, estimated", answer.activations)
        yield (
            f"      (about {ACTIVATION_BYTES_PER_UNIT} bytes per token and unit of width at 16 "
            "bits, fitted to the paper's Figure 2)"
        )
        yield _row("with the estimate", answer.total)
    yield ""
    spare = question.memory - answer.total
    verdict = "fits, to spare" if spare >= 0 else "does NOT fit, missing"
    yield _row(f"memory ({question.memory_of})", question.memory)
    yield _row(verdict, abs(spare))
    yield f"  longest context for a batch of {question.batch}: {_most(room.context, 'tokens')}"
    yield (f"  largest batch at {question.context:,} tokens: {_most(room.batch, 'sequences')}")
    if not answer.activations:
        yield "  (before activations: --chunk adds an estimate of them)"


def _row(name: str, count: int) -> str:
    return f"  {name:28}{show_bytes(count):>12}{count:24,}"


def _most(number: int | None, unit: str) -> str:
    if number is None:
        return "not limited by memory"
    return f"{number:,} {unit}" if number else "none fits"


def as_values(model: str, question: Question, answer: MemoryPlan, room: Room) -> dict[str, Any]:
    """Return what `--json` prints; all sizes are in bytes."""
    return {
        "model": model,
        "context": question.context,
        "batch": question.batch,
        "format": question.weights,
        "chunk": WHOLE_PROMPT if question.chunk is None else question.chunk or None,
        "memory": question.memory,
        "bytes": {
            "weights": answer.weights,
            "kv_cache": answer.kv_cache,
            "scan_states": answer.scan_states,
            "conv_states": answer.conv_states,
            "exact": answer.exact,
            "activations_estimate": answer.activations,
            "total": answer.total,
        },
        "fits": answer.total <= question.memory,
        "largest": asdict(room),
    }
