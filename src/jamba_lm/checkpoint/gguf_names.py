"""One table between our parameter names and the tensor names of Jamba's GGUF files.

Knows names and shapes only: no tensors, no files, no torch.

A GGUF file stacks the experts of a layer in three tensors; everything else is one to one.

Source: llama.cpp `src/models/jamba.cpp`, `src/llama-arch.cpp` and `conversion/jamba.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jamba_lm.checkpoint.rename import OWN_LAYER, Shape

EMBEDDING, HEAD, ROUTER = "token_embd.weight", "output.weight", "ffn_gate_inp.weight"
DECAY = "ssm_a"
LAYER = re.compile(r"blk\.([0-9]{1,6})\.(.+)", re.DOTALL)

OUTSIDE_LAYERS: Mapping[str, str] = {
    "embedding.weight": EMBEDDING,
    "final_norm.weight": "output_norm.weight",
    "head.weight": HEAD,
}
INSIDE_A_LAYER: Mapping[str, str] = {
    "mixer_norm.weight": "attn_norm.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv_CW": "ssm_conv1d.weight",
    "mixer.conv_bias_C": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_norm.weight": "ssm_dt_norm.weight",
    "mixer.B_norm.weight": "ssm_b_norm.weight",
    "mixer.C_norm.weight": "ssm_c_norm.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_bias_C": "ssm_dt.bias",
    "mixer.log_decay_CN": DECAY,
    "mixer.skip_C": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
    "feed_forward.router.weight": ROUTER,
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
}
EXPERT = re.compile(r"feed_forward\.experts\.([0-9]+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one weight is found in a GGUF file.

    Attributes:
        tensor: name of the tensor.
        expert: index into its first axis, for a stack of experts.
    """

    tensor: str
    expert: int | None = None


def place_of(own: str) -> Place:
    """Return the place of one of the decoder's parameters.

    >>> place_of("blocks.4.mixer.log_decay_CN")
    Place(tensor='blk.4.ssm_a', expert=None)
    >>> place_of("blocks.1.feed_forward.experts.3.up_proj.weight")
    Place(tensor='blk.1.ffn_up_exps.weight', expert=3)

    Raises:
        KeyError: the table has no such parameter.
    """
    if own in OUTSIDE_LAYERS:
        return Place(OUTSIDE_LAYERS[own])
    match = OWN_LAYER.fullmatch(own)
    if match is None:
        raise KeyError(own)
    index, rest = match.groups()
    if expert := EXPERT.fullmatch(rest):
        return Place(f"blk.{index}.ffn_{expert[2]}_exps.weight", int(expert[1]))
    return Place(f"blk.{index}.{INSIDE_A_LAYER[rest]}")


def stacked_shapes(shapes: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Return the tensors that a file of these parameters holds, experts stacked.

    >>> name = "blocks.1.feed_forward.experts.{}.up_proj.weight"
    >>> stacked_shapes((name.format(e), (6, 4)) for e in range(3))
    {'blk.1.ffn_up_exps.weight': (3, 6, 4)}
    """
    found: dict[str, Shape] = {}
    for own, shape in shapes:
        place = place_of(own)
        if place.expert is None:
            found[place.tensor] = tuple(shape)
        else:
            before = found.get(place.tensor, (0,))
            found[place.tensor] = (max(before[0], place.expert + 1), *shape)
    return found


def layers_with(tensor: str, names: Iterable[str]) -> set[int]:
    """Return the layers that have a tensor of this name.

    >>> sorted(layers_with("ssm_a", ["blk.0.ssm_a", "blk.7.ssm_a", "blk.2.ssm_d"]))
    [0, 7]
    """
    matches = [LAYER.fullmatch(name) for name in names]
    return {int(match[1]) for match in matches if match and match[2] == tensor}
