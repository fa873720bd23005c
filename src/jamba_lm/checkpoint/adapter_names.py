"""PEFT's names of an adapter's tensors, against the modules of transformers' JambaForCausalLM.

Knows names only. Transformers 5 keeps the experts of a layer as two stacked parameters,
`experts.gate_up_proj` and `experts.down_proj`; peft wraps one around the other, so that the
factors of the first are called `experts.base_layer.lora_A` when both have some. Older versions have
a module for each matrix of each expert; both are read.

Source: peft 0.21, `ParamWrapper` in `tuners/lora/layer.py`, `inject_adapter` in
`tuners/tuners_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
EMBEDDING = "model.embed_tokens"
BASE = re.compile(r"(model\.embed_tokens|lm_head)\.base_layer\.weight")
EMBEDDING_FACTOR = re.compile(r"(.+)\.(lora_embedding_A|lora_embedding_B)")
STACK = re.compile(r"(model\.layers\.[0-9]{1,6}\.feed_forward\.experts)(\.base_layer)?")
EXPERT = re.compile(
    r"(model\.layers\.[0-9]{1,6}\.feed_forward\.experts)\.([0-9]{1,6})\."
    r"(gate_proj|up_proj|down_proj)"
)
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What peft 0.21 calls the parameters that it cannot take as modules.
PARAMETERS = {GATE_UP: "experts.gate_up_proj", DOWN: "experts.down_proj", "router": "router.weight"}


def stacked_parameter(stack: str, stacks: Iterable[str], targets: Iterable[str]) -> str | None:
    """Return which parameter the factors of one stack of experts are for, or None if unclear.

    Args:
        stack: the public name of the wrapper, perhaps ending in `.base_layer`.
        stacks: of all wrappers in the file.
        targets: the configuration's target_parameters.
    """
    if stack.endswith(".base_layer"):
        return GATE_UP
    if f"{stack}.base_layer" in stacks:
        return DOWN
    wanted = {
        kind
        for kind in (GATE_UP, DOWN)
        for target in targets
        if f"{stack}.{kind}".endswith(f".{target}") or f"{stack}.{kind}" == target
    }
    return wanted.pop() if len(wanted) == 1 else None


def shortest_names(chosen: Iterable[str], all_names: Iterable[str], short: str) -> list[str]:
    """Return how a configuration names its targets: `short` when it means all and only these.

    >>> shortest_names(["a.0.x", "a.1.x"], ["a.0.x", "a.1.x", "a.1.y"], "x")
    ['x']
    >>> shortest_names(["a.0.x"], ["a.0.x", "a.1.x"], "x")
    ['a.0.x']
    """
    names = sorted(chosen)
    meant = sorted(one for one in all_names if one == short or one.endswith(f".{short}"))
    return [short] if names == meant else names
