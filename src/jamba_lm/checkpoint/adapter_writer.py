"""Adapters written in PEFT's format, as peft 0.21 loads them over transformers' Jamba.

The experts' factors are stacked, since transformers 5 keeps the experts so. Gate and up are one
parameter there: their two changes of rank R become one of rank 2R, with zeros where one has no part
in the other, and with a pattern in the configuration that keeps the scale.

X experts, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jamba_lm.checkpoint.adapter import Adapter, LowRank
from jamba_lm.checkpoint.adapter_config import NAME
from jamba_lm.checkpoint.adapter_names import (
    DOWN,
    EMBEDDING,
    EXPERT,
    GATE_UP,
    PARAMETERS,
    PREFIX,
    shortest_names,
)
from jamba_lm.checkpoint.adapter_reader import WEIGHTS
from jamba_lm.checkpoint.rename import public_name, public_shape
from jamba_lm.config import JambaConfig
from jamba_lm.files import make_folder, write_json
from jamba_lm.model.decoder import Decoder
from jamba_lm.tensor_file import write_tensors

Stack = dict[int, dict[str, LowRank]]


def write_adapter(
    folder: Path, adapter: Adapter, config: JambaConfig, *, alpha: float, rslora: bool = False
) -> int:
    """Write adapter_config.json and adapter_model.safetensors, each whole or not at all.

    Args:
        folder: made when missing.
        adapter: all of whose changes have one rank; its factors are stored in float32.
        config: of the model that it is for.
        alpha: what the scale was made from.
        rslora: whether it was by alpha / sqrt(rank).

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: the operating system refused.
    """
    (rank,) = {change.rank for change in adapter.changes.values()}
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {own: tuple(x.shape) for own, x in decoder.named_parameters()}
    modules = [public_name(own).removesuffix(".weight") for own, s in shapes.items() if len(s) == 2]
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, Stack] = {}
    plain: list[str] = []
    for own, change in adapter.changes.items():
        module = public_name(own).removesuffix(".weight")
        expert = EXPERT.fullmatch(module)
        if expert is not None:
            layer, number, leaf = expert.groups()
            stacks.setdefault(layer, {}).setdefault(int(number), {})[leaf] = change
            continue
        plain.append(module)
        tensors |= _factors(module, change.down_RI, change.up_OR)
    parameters: dict[str, list[str]] = {}
    for layer, stack in stacks.items():
        kinds = _kinds(stack)
        for kind in kinds:
            # The second parameter's wrapper is around the first one's.
            inner = ".base_layer" if kind == GATE_UP and DOWN in kinds else ""
            tensors |= _stacked(f"{layer}{inner}", kind, stack, config)
            parameters.setdefault(kind, []).append(f"{layer}.{kind}")
    for own, value in adapter.replaced.items():
        tensors[PREFIX + public_name(own)] = value.reshape(public_shape(own, shapes[own]))
    values = {
        **_targets(plain, parameters, modules, config),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        # It has no part in inference, and peft takes none over stacked parameters.
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": sorted({_module_of(own) for own in adapter.replaced}) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if any(len(_gate_up(stack)) == 2 for stack in stacks.values()):
        name = PARAMETERS[GATE_UP]
        values["rank_pattern"] = {name: 2 * rank}
        values["alpha_pattern"] = {name: alpha * (2**0.5 if rslora else 2)}
    make_folder(folder)
    stored = {name: one.detach().float().contiguous() for name, one in sorted(tensors.items())}
    write_tensors(folder / WEIGHTS, stored, {"format": "pt"})
    write_json(folder / NAME, values)
    return sum(one.nbytes for one in stored.values())


def _module_of(own: str) -> str:
    return public_name(own).rpartition(".")[0].rpartition(".")[2]


def _factors(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if module == EMBEDDING:
        # For rows that are looked up, peft keeps the factors the other way round.
        return {
            f"{PREFIX}{module}.lora_embedding_A": up.t(),
            f"{PREFIX}{module}.lora_embedding_B": down.t(),
        }
    return {
        f"{PREFIX}{module}.lora_A.weight": down,
        f"{PREFIX}{module}.lora_B.weight": up,
    }


def _gate_up(stack: Stack) -> list[str]:
    return [leaf for leaf in ("gate_proj", "up_proj") if leaf in stack[0]]


def _kinds(stack: Stack) -> list[str]:
    return [*([GATE_UP] if _gate_up(stack) else []), *([DOWN] if "down_proj" in stack[0] else [])]


def _stacked(module: str, kind: str, stack: Stack, config: JambaConfig) -> dict[str, Tensor]:
    """Put the factors of one parameter of all experts together; see `adapter_reader`."""
    downs, ups = [], []
    for number in range(config.num_experts):
        parts = stack[number]
        if kind == DOWN:
            downs.append(parts["down_proj"].down_RI)
            ups.append(parts["down_proj"].up_OR)
            continue
        leaves = _gate_up(stack)
        downs.append(torch.cat([parts[leaf].down_RI for leaf in leaves]))
        if len(leaves) == 2:
            ups.append(torch.block_diag(*(parts[leaf].up_OR for leaf in leaves)))
        else:
            (up_OR,) = (parts[leaf].up_OR for leaf in leaves)
            nothing = torch.zeros_like(up_OR)
            ups.append(torch.cat([up_OR, nothing] if "gate_proj" in leaves else [nothing, up_OR]))
    down = torch.stack(downs).flatten(0, 1)
    up = torch.stack(ups).permute(1, 2, 0).flatten(1)
    return _factors(module, down, up)


def _targets(
    plain: list[str], parameters: Mapping[str, list[str]], modules: list[str], config: JambaConfig
) -> dict[str, Any]:
    leaves: dict[str, list[str]] = {}
    for module in plain:
        leaves.setdefault(module.rpartition(".")[2], []).append(module)
    # Transformers' router is a module of its own kind, of which peft takes the parameter only.
    routers = leaves.pop("router", [])
    # There is no module for each expert.
    known = [one for one in modules if not EXPERT.fullmatch(one)]
    named = [name for leaf, some in leaves.items() for name in shortest_names(some, known, leaf)]
    layers = {match[1] for one in modules if (match := EXPERT.fullmatch(one))}
    stacked = [
        name
        for kind, some in parameters.items()
        for name in shortest_names(some, [f"{layer}.{kind}" for layer in layers], PARAMETERS[kind])
    ]
    every_router = [f"{one}.weight" for one in known if one.endswith(".router")]
    if routers:
        some = [f"{one}.weight" for one in routers]
        stacked += shortest_names(some, every_router, PARAMETERS["router"])
    return {"target_modules": sorted(named), "target_parameters": sorted(stacked) or None}
