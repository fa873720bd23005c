"""One table between our parameter names and the tensor names of Jamba checkpoints.

Knows names and shapes only: no tensors, no files, no torch.

"Public" names are those transformers writes (`model.layers.4.mamba.A_log`); "own" names are the
decoder's (`blocks.4.mixer.log_decay_CN`). Older and in-memory spellings are read, never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
}
INSIDE_A_LAYER = {
    "mixer_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "pre_ff_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.o_proj.weight": "self_attn.o_proj.weight",
    "mixer.in_proj.weight": "mamba.in_proj.weight",
    "mixer.in_proj.bias": "mamba.in_proj.bias",
    "mixer.conv_CW": "mamba.conv1d.weight",
    "mixer.conv_bias_C": "mamba.conv1d.bias",
    "mixer.x_proj.weight": "mamba.x_proj.weight",
    "mixer.dt_norm.weight": "mamba.dt_layernorm.weight",
    "mixer.B_norm.weight": "mamba.b_layernorm.weight",
    "mixer.C_norm.weight": "mamba.c_layernorm.weight",
    "mixer.dt_proj.weight": "mamba.dt_proj.weight",
    "mixer.dt_bias_C": "mamba.dt_proj.bias",
    "mixer.log_decay_CN": "mamba.A_log",
    "mixer.skip_C": "mamba.D",
    "mixer.out_proj.weight": "mamba.out_proj.weight",
    "mixer.out_proj.bias": "mamba.out_proj.bias",
}
# Feed-forward names, dense and sparse, are spelled the same on both sides.
FEED_FORWARD = re.compile(
    r"feed_forward\.(router|(experts\.[0-9]+\.)?(gate_proj|up_proj|down_proj))\.weight"
)

# Spellings of the pre-release checkpoints ("mini-jamba"), as llama.cpp's converter knows them.
PRE_RELEASE = {
    ".moe.": ".feed_forward.",
    ".pre_moe_layernorm.": ".pre_ff_layernorm.",
    ".B_layernorm.": ".b_layernorm.",
    ".C_layernorm.": ".c_layernorm.",
}
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.+)", re.DOTALL)
OWN_LAYER = re.compile(r"blocks\.([0-9]+)\.(.+)")
FUSED = re.compile(r"(model\.layers\.[0-9]{1,6}\.feed_forward\.experts)\.(gate_up_proj|down_proj)")
ONE_EXPERT = re.compile(r"(model\.layers\.([0-9]{1,6})\.feed_forward\.)experts\.0\.(.+)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one weight is found: a stored tensor, or a part of a stack of experts.

    Attributes:
        tensor: name of the stored tensor.
        expert: index into its first axis, for a stack of experts.
        rows: first and end row within that expert, when gate and up share a tensor.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


def public_name(own: str) -> str:
    """Return the checkpoint's name for one of the decoder's parameters.

    >>> public_name("blocks.4.mixer.log_decay_CN")
    'model.layers.4.mamba.A_log'
    >>> public_name("blocks.1.feed_forward.experts.3.up_proj.weight")
    'model.layers.1.feed_forward.experts.3.up_proj.weight'

    Raises:
        KeyError: the table has no such parameter.
    """
    if own in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[own]
    match = OWN_LAYER.fullmatch(own)
    if match is None:
        raise KeyError(own)
    index, rest = match.groups()
    if not FEED_FORWARD.fullmatch(rest):
        rest = INSIDE_A_LAYER[rest]
    return f"model.layers.{index}.{rest}"


def public_shape(own: str, shape: Iterable[int]) -> Shape:
    """Return the shape a parameter has in a checkpoint, where convolution taps are [C, 1, W].

    >>> public_shape("blocks.0.mixer.conv_CW", (8, 4))
    (8, 1, 4)
    """
    shape = tuple(shape)
    return (shape[0], 1, shape[1]) if own.endswith(".conv_CW") else shape


def find_sources(stored: Mapping[str, Shape], num_experts: int) -> dict[str, list[Source]]:
    """Translate every stored tensor into public names; several sources mean a clash.

    Understands the public names, those of pre-release checkpoints (in which a dense layer is a
    single expert without a router) and the stacks that transformers 5 keeps in memory. A stack
    of another number of experts than `num_experts` keeps its own name, to be reported.

    >>> find_sources({"model.layers.0.moe.experts.0.up_proj.weight": (6, 4)}, num_experts=2)
    {'model.layers.0.feed_forward.up_proj.weight': \
[Source(tensor='model.layers.0.moe.experts.0.up_proj.weight', expert=None, rows=None)]}
    """
    modern = {name: _modern_spelling(name) for name in stored}
    sparse = {layer for name in modern.values() if (layer := _sparse_layer(name)) is not None}
    found: dict[str, list[Source]] = {}
    for name, spelling in modern.items():
        lone = ONE_EXPERT.fullmatch(spelling)
        if lone is not None and int(lone[2]) not in sparse:
            spelling = lone[1] + lone[3]
        for public, source in _unstack(name, spelling, stored[name], num_experts):
            found.setdefault(public, []).append(source)
    return found


def _modern_spelling(name: str) -> str:
    for old, new in PRE_RELEASE.items():
        name = name.replace(old, new)
    return name


def _sparse_layer(name: str) -> int | None:
    # A layer is sparse when it has a router or any expert after the first.
    match = LAYER.fullmatch(name)
    if match is None:
        return None
    rest = match[2]
    router = rest.startswith("feed_forward.router.")
    expert = rest.startswith("feed_forward.experts.") and not rest.startswith(
        "feed_forward.experts.0."
    )
    return int(match[1]) if router or expert else None


def _unstack(
    name: str, spelling: str, shape: Shape, num_experts: int
) -> Iterable[tuple[str, Source]]:
    match = FUSED.fullmatch(spelling)
    if match is None or len(shape) != 3 or shape[0] != num_experts:
        return [(spelling, Source(name))]
    prefix, kind = match.groups()
    if kind == "down_proj":
        return [(f"{prefix}.{e}.down_proj.weight", Source(name, e)) for e in range(num_experts)]
    if shape[1] % 2:
        return [(spelling, Source(name))]
    middle = shape[1] // 2
    halves = {"gate_proj": (0, middle), "up_proj": (middle, 2 * middle)}
    return [
        (f"{prefix}.{e}.{half}.weight", Source(name, e, rows))
        for e in range(num_experts)
        for half, rows in halves.items()
    ]


def source_shape(source: Source, stored: Shape) -> Shape:
    """Return the shape of what `source` takes from a tensor of shape `stored`."""
    shape = stored if source.expert is None else stored[1:]
    return shape if source.rows is None else (source.rows[1] - source.rows[0], *shape[1:])
