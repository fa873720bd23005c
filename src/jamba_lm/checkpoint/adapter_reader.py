"""Adapters in PEFT's format, read: every tensor is used and fits the model, or one error says why.

Knows files and names; what an adapter does to weights is `adapter.py`'s business.

X experts, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.adapter import Adapter, LowRank
from jamba_lm.checkpoint.adapter_config import AdapterSettings, read_settings
from jamba_lm.checkpoint.adapter_names import (
    BASE,
    EMBEDDING,
    EMBEDDING_FACTOR,
    EXPERT,
    FACTOR,
    GATE_UP,
    PREFIX,
    STACK,
    stacked_parameter,
)
from jamba_lm.checkpoint.diagnosis import listed, shown
from jamba_lm.checkpoint.huggingface import DTYPES
from jamba_lm.checkpoint.rename import find_sources, public_name, public_shape, source_shape
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError
from jamba_lm.files import path_kind
from jamba_lm.model.decoder import Decoder
from jamba_lm.tensor_file import TensorFile

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

Factors = dict[str, Tensor]


def read_adapter(folder: str | Path, config: JambaConfig) -> Adapter:
    """Read an adapter for a model of this config.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors, as `PeftModel`'s
            `save_pretrained` and `jamba finetune` write them.
        config: of the model that it is for.

    Raises:
        CheckpointError: no sound adapter there, one of a kind that is not supported, or one for
            another model; the message names what is wrong.
    """
    folder = Path(folder)
    if path_kind(folder) != "folder":
        raise CheckpointError(
            f"no adapter at {str(folder)!r}: expected a folder with adapter_config.json and "
            f"{WEIGHTS}"
        )
    settings = read_settings(folder)
    path = folder / WEIGHTS
    if path_kind(path) == "missing" and path_kind(folder / PICKLE) != "missing":
        raise CheckpointError(
            f"{str(folder / PICKLE)!r} is a pickle, which can run any code when read and so never "
            "is: save the adapter as safetensors where you trust it"
        )
    with TensorFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.names}
    return _Reading(folder, settings, config).adapter(tensors)


class _Reading:
    def __init__(self, folder: Path, settings: AdapterSettings, config: JambaConfig) -> None:
        self._folder, self._settings, self._config = folder, settings, config
        with torch.device("meta"):
            decoder = Decoder(config)
        self._shapes = {own: tuple(x.shape) for own, x in decoder.named_parameters()}
        self._own = {public_name(own): own for own in self._shapes}
        self._changes: dict[str, LowRank] = {}

    def _refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"the adapter in {str(self._folder)!r} {reason}")

    def adapter(self, tensors: Mapping[str, Tensor]) -> Adapter:
        if not tensors:
            raise self._refuse("holds no tensor")
        pairs: dict[str, Factors] = {}
        whole: dict[str, Tensor] = {}
        # Matrices that peft saved beside their change: it does so for embedding and head, whose
        # vocabulary may have grown.
        bases: set[str] = set()
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise self._refuse(f"holds {shown(name)} as {tensor.dtype}: expected floats")
            public = name.removeprefix(PREFIX)
            if public == name:
                raise self._refuse(
                    f"holds {shown(name)}: expected names that begin with {PREFIX!r}, as peft "
                    "writes them"
                )
            match = FACTOR.fullmatch(public) or EMBEDDING_FACTOR.fullmatch(public)
            if match is not None:
                pairs.setdefault(match[1], {})[match[2]] = tensor
            elif ".lora_" in public:
                raise self._refuse(
                    f"holds {shown(name)}, which is no part of plain LoRA: merge it with peft and "
                    "load the result"
                )
            elif (base := BASE.fullmatch(public)) is not None:
                if f"{PREFIX}{base[1]}.weight" in tensors:
                    raise self._refuse(f"holds {base[1]} twice, with and without base_layer")
                whole[f"{base[1]}.weight"] = tensor
                bases.add(f"{base[1]}.weight")
            else:
                whole[public] = tensor
        stacks = {module for module in pairs if STACK.fullmatch(module)}
        for module, factors in pairs.items():
            self._take_pair(module, factors, stacks)
        replaced = self._whole(whole)
        both = sorted(
            name
            for name in self._changes.keys() & replaced.keys()
            if public_name(name) not in bases
        )
        if both:
            raise self._refuse(f"both changes and replaces {listed(both)}")
        return Adapter(self._changes, replaced, self._settings.base)

    def _take_pair(self, module: str, factors: Factors, stacks: set[str]) -> None:
        if "lora_embedding_A" in factors or "lora_embedding_B" in factors:
            factors = self._of_embedding(module, factors)
        down, up = factors.get("lora_A"), factors.get("lora_B")
        if down is None or up is None:
            missing = "lora_A" if down is None else "lora_B"
            raise self._refuse(f"has no {missing} for {shown(module)}: is the file complete?")
        if down.dim() != 2 or up.dim() != 2 or 0 in (*down.shape, *up.shape):
            raise self._refuse(
                f"has factors of shapes {list(down.shape)} and {list(up.shape)} for "
                f"{shown(module)}: expected matrices; were they gathered before they were saved?"
            )
        if module in stacks:
            self._take_stack(module, down, up, stacks)
        else:
            if self._config.tie_embeddings and module in ("lm_head", EMBEDDING):
                raise self._refuse(
                    f"changes {module} alone, but the model uses one matrix for both embedding and "
                    "head: it cannot be added to either"
                )
            own = self._own.get(f"{module}.weight")
            if own is None or len(self._shapes[own]) != 2 or "conv" in module:
                raise self._unknown(module)
            # Transformers' router is a parameter to peft, and patterns are matched with its name.
            known_as = f"{module}.weight" if module.endswith(".router") else module
            self._add(own, known_as, down, up, self._settings.scale_of(known_as))

    def _unknown(self, module: str) -> CheckpointError:
        expert = EXPERT.fullmatch(module)
        more = ""
        if expert is not None and self._config.num_experts <= int(expert[2]):
            more = f": the model has {self._config.num_experts} experts"
        return self._refuse(f"is for a module {shown(module)} that this model does not have{more}")

    def _of_embedding(self, module: str, factors: Factors) -> Factors:
        # For rows that are looked up, peft keeps the factors the other way round.
        names = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
        if factors.keys() - names.keys():
            raise self._refuse(f"holds two kinds of factors for {shown(module)}")
        return {names[name]: tensor.t() for name, tensor in factors.items()}

    def _take_stack(self, module: str, down: Tensor, up: Tensor, stacks: set[str]) -> None:
        """Take the factors of all experts of a layer apart.

        peft keeps the ranks of each expert together in lora_A, and the experts of each rank
        together in lora_B.
        """
        kind = stacked_parameter(module, stacks, self._settings.target_parameters)
        if kind is None:
            raise self._refuse(
                f"has factors for {shown(module)}, and its target_parameters "
                f"{list(self._settings.target_parameters)} do not say for which parameter: "
                "expected experts.gate_up_proj or experts.down_proj"
            )
        layer = module.removesuffix(".base_layer")
        public = f"{layer}.{kind}"
        experts = self._config.num_experts
        if f"{layer}.0.down_proj.weight" not in self._own:
            raise self._unknown(public)
        if down.shape[0] != up.shape[1] or down.shape[0] % experts:
            raise self._refuse(
                f"has factors of shapes {list(down.shape)} and {list(up.shape)} for "
                f"{shown(public)}: expected a multiple of the model's {experts} experts"
            )
        down_XRI = down.reshape(experts, -1, down.shape[1])
        up_XOR = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
        scale = self._settings.scale_of(public)
        for number in range(experts):
            halves = {"down_proj": up_XOR[number]}
            if kind == GATE_UP:
                if up_XOR.shape[1] % 2:
                    raise self._refuse(f"has an odd number of outputs for {shown(public)}")
                gate_OR, rows_OR = up_XOR[number].chunk(2)
                halves = {"gate_proj": gate_OR, "up_proj": rows_OR}
            for leaf, up_OR in halves.items():
                own = self._own[f"{layer}.{number}.{leaf}.weight"]
                self._add(own, public, down_XRI[number], up_OR, scale)

    def _add(self, own: str, module: str, down_RI: Tensor, up_OR: Tensor, scale: float) -> None:
        outputs, inputs = self._shapes[own]
        found = (up_OR.shape[0], up_OR.shape[1], down_RI.shape[0], down_RI.shape[1])
        rank = found[1]
        if found != (outputs, rank, rank, inputs):
            raise self._refuse(
                f"has factors {list(up_OR.shape)} and {list(down_RI.shape)} for {own}, whose shape "
                f"is {[outputs, inputs]}: it is for another model"
            )
        if rank != self._settings.rank_of(module):
            raise self._refuse(
                f"has rank {rank} for {shown(module)}, but its adapter_config.json says "
                f"{self._settings.rank_of(module)}: do the two files belong together?"
            )
        if own in self._changes:
            raise self._refuse(f"changes {own} twice")
        self._changes[own] = LowRank(down_RI, up_OR, scale)

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate the tensors of modules_to_save."""
        stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        replaced: dict[str, Tensor] = {}
        for public, sources in find_sources(stored, self._config.num_experts).items():
            own, source = self._own.get(public), sources[0]
            if public == "lm_head.weight" and self._config.tie_embeddings:
                embedding = tensors.get("model.embed_tokens.weight")
                if embedding is not None and torch.equal(embedding, tensors[source.tensor]):
                    continue
                raise self._refuse(
                    "replaces lm_head alone, but the model uses one matrix for both embedding and "
                    "head"
                )
            if own is None:
                raise self._unknown(public)
            shape = source_shape(source, stored[source.tensor])
            if shape != public_shape(own, self._shapes[own]):
                raise self._refuse(
                    f"replaces {public} by one of shape {list(shape)}, but the model's is "
                    f"{list(public_shape(own, self._shapes[own]))}"
                )
            value = tensors[source.tensor]
            value = value if source.expert is None else value[source.expert]
            value = value if source.rows is None else value[slice(*source.rows)]
            replaced[own] = value.reshape(self._shapes[own])
        return replaced
