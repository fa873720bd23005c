"""`jamba inspect`: what a model is made of, and where its parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jamba_lm.analysis.memory import (
    ParameterCounts,
    parameter_counts,
    weight_bytes,
    weight_format,
)
from jamba_lm.cli.options import JsonOption
from jamba_lm.cli.output import Output
from jamba_lm.cli.shapes import SetOption, ShapeArgument, open_shape, stored_format
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import draw_layer, draw_layers, plan_layers

LAYERS_PER_LINE = 8


def inspect(model: ShapeArgument, sets: SetOption = None, json: JsonOption = False) -> None:
    """Show the layers of a model, its parameters, and where they are.

    Reads a config.json, no weights.
    """
    config, without_effect = open_shape(model, sets)
    counts = parameter_counts(config)
    output = Output(json)
    output.line(model)
    for line in describe(config, counts):
        output.line(line)
    form = stored_format(model)
    if form is not None:
        kept = f"{weight_format(form).description}, {weight_bytes(config, form):,} bytes"
        output.line(f"  weights: {kept}")
    if without_effect:
        output.note(f"without effect (--json says why): {', '.join(without_effect)}")
    output.result({**as_values(model, config, counts, without_effect), "quantization": form})


def describe(config: JambaConfig, counts: ParameterCounts) -> Iterator[str]:
    """Yield the lines that show a model to a person."""
    yield ""
    yield from picture(config)
    yield ""
    yield from sizes(config)
    yield ""
    yield from parameter_table(counts)


def picture(config: JambaConfig) -> Iterator[str]:
    """Draw the stack, one repetition of its pattern a line, and explain the signs."""
    signs = [draw_layer(layer) for layer in plan_layers(config)]
    # A line for each repetition shows the rhythm; a period that fits no line shows none anyway.
    period = config.attention_period
    length = period if 4 <= period <= 2 * LAYERS_PER_LINE else LAYERS_PER_LINE
    for first in range(0, len(signs), length):
        line = " ".join(sign.ljust(2) for sign in signs[first : first + length])
        yield f"{first:6}  {line}".rstrip()
    legend = {"m": "m Mamba", "A": "A attention"}
    shown = [text for sign, text in legend.items() if any(sign in drawn for drawn in signs)]
    if any("*" in drawn for drawn in signs):
        shown.append(
            f"* {config.num_experts} experts, {config.experts_per_token} for each token, "
            "instead of one MLP"
        )
    yield f"        {', '.join(shown)}"


def sizes(config: JambaConfig) -> Iterator[str]:
    """Say the widths, leaving out those that nothing in this model has."""
    mixers = {layer.mixer for layer in plan_layers(config)}
    tied = "the head is the embedding" if config.tie_embeddings else "head apart"
    yield f"  {config.num_layers} layers of width {config.d_model:,}, MLP width {config.d_ff:,}"
    yield f"  vocabulary of {config.vocab_size:,}, {tied}"
    if "attention" in mixers:
        positions = "rotary positions" if config.position == "rope" else "no positions"
        yield (
            f"  attention: {config.num_heads} heads of {config.d_head}, "
            f"{config.num_kv_heads} for keys and values, {positions}"
        )
    if "mamba" in mixers:
        norms = "dt, B and C normalised" if config.inner_norms else "no inner norms"
        yield (
            f"  Mamba: {config.d_inner:,} channels, state of {config.state_size}, "
            f"convolution over {config.conv_width}, dt of rank {config.dt_rank}, {norms}"
        )


def parameter_table(counts: ParameterCounts) -> Iterator[str]:
    """Yield a table of the parts, the largest first."""
    yield f"  {'':10}{'parameters':>19}{'share':>9}{'for one token':>19}{'share':>9}"
    rows = sorted(counts.total_by_part.items(), key=lambda row: -row[1])
    for part, total in rows:
        active = counts.active_by_part[part]
        yield (
            f"  {part:10}{total:19,}{share(total, counts.total)}"
            f"{active:19,}{share(active, counts.active)}"
        )
    yield f"  {'all':10}{counts.total:19,}{'':9}{counts.active:19,}"


def share(part: int, whole: int) -> str:
    """Write a part of a whole as a percentage, nine characters wide."""
    return f"{100 * part / whole:7.2f} %"


def as_values(
    model: str, config: JambaConfig, counts: ParameterCounts, without_effect: dict[str, str]
) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "model": model,
        "picture": draw_layers(config),
        "layers": [
            {"mixer": layer.mixer, "feed_forward": layer.feed_forward}
            for layer in plan_layers(config)
        ],
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "by_part": {
                part: {"total": total, "active": counts.active_by_part[part]}
                for part, total in counts.total_by_part.items()
            },
        },
        "config": config.to_dict(),
        "without_effect": without_effect,
    }
