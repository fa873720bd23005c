"""What a GGUF file's header says about the model, read into a config and written from one.

The layer pattern is a list: `head_count_kv` has a 0 for each Mamba layer, and the layers with
experts are those that have a router. A config says a period and an offset, so an irregular
pattern is refused. Needs no torch.

Source: llama.cpp `conversion/jamba.py` (what is written) and `src/models/jamba.cpp` (what is
demanded).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from jamba_lm.checkpoint.gguf_names import EMBEDDING, HEAD, ROUTER, layers_with
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError, ConfigError
from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_output import Typed
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.model.layout import plan_layers

ARCHITECTURE = "jamba"
# llama.cpp's own bounds (llama-hparams.h), beyond which it stops with an assertion.
MAX_LAYERS, MAX_EXPERTS = 512, 1024
STOP_KEYS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
BOS_KEY, PAD_KEY = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"
# What a GGUF file has no words for, under keys that other programs skip.
OWN_KEYS: Mapping[str, str] = {
    "attention_period": "uint32",
    "attention_offset": "uint32",
    "expert_period": "uint32",
    "expert_offset": "uint32",
    "num_experts": "uint32",
    "experts_per_token": "uint32",
    "initializer_range": "float64",
    "aux_loss_coef": "float64",
    "eos_ids": "uint32[]",
}
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def load_gguf_config(path: str | Path) -> JambaConfig:
    """Read the config of a GGUF file, no weights.

    Raises:
        CheckpointError: no sound GGUF file of a Jamba model.
    """
    return read_config(open_gguf(path))


def read_config(file: GgufFile) -> JambaConfig:
    """Read the config of an open GGUF file.

    Raises:
        CheckpointError: not a Jamba model, a value is missing or impossible, or the layers follow
            a pattern that no period and offset express.
    """
    header = _Header(file)
    kind = file.get("general.architecture")
    if kind != ARCHITECTURE:
        raise header.error(f"general.architecture is {kind!r:.60}, expected {ARCHITECTURE!r}")
    depth = header.integer("block_count")
    if not 1 <= depth <= len(file.tensors):
        raise header.error(f"{depth} layers are claimed for {len(file.tensors)} tensors")
    if EMBEDDING not in file.tensors or len(file.tensors[EMBEDDING].shape) != 2:
        raise header.error(f"it has no table {EMBEDDING}, without which there is no model")
    width, heads = header.integer("embedding_length"), header.integer("attention.head_count")
    kv_heads, attention = _attention_layers(header, depth)
    sparse = layers_with(ROUTER, file.tensors)
    if sparse and max(sparse) >= depth:
        raise header.error(f"layer {max(sparse)} has a router, but there are {depth} layers")
    fields: dict[str, Any] = {
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "d_model": width,
        "d_ff": header.integer("feed_forward_length"),
        "num_layers": depth,
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "tie_embeddings": HEAD not in file.tensors,
        "norm_eps": _shortest(header.number("attention.layer_norm_rms_epsilon")),
        "context_length": header.integer("context_length"),
    }
    if (d_head := header.optional("attention.key_length")) is not None:
        fields["d_head"] = d_head
    if len(attention) < depth or header.optional("ssm.inner_size") is not None:
        fields |= _mamba_fields(header, width)
    own = _own_fields(header)
    if sparse:
        own |= {
            "num_experts": header.integer("expert_count"),
            "experts_per_token": header.integer("expert_used_count"),
        }
    else:
        fields |= {"num_experts": 1, "experts_per_token": 1}
    fields |= _ids(header) | own
    fields |= _regular(header, "attention", attention, depth, own)
    # With one expert there is none to choose, whatever the period says.
    if sparse or fields["num_experts"] > 1:
        fields |= _regular(header, "expert", sparse, depth, own)
    try:
        return JambaConfig(**fields)
    except ConfigError as error:
        raise header.error(str(error)) from error


class _Header:
    """The header of a Jamba file, whose values are checked when they are taken."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"cannot read {str(self.file.path)!r} as a Jamba model: {reason}")

    def optional(self, name: str, prefix: str = f"{ARCHITECTURE}.") -> int | None:
        """Return a whole number, or None without the key; a list of equal numbers counts as one."""
        key = prefix + name
        kind = self.file.type_of(key)
        if kind is None:
            return None
        if kind in INTEGERS:
            return int(self.file.get(key))
        # The number of layers cannot itself be a list with one number a layer.
        if kind.removesuffix("[]") not in INTEGERS or name == "block_count":
            raise self.error(f"{key} is of type {kind}, expected a whole number")
        values = set(self.per_layer(key))
        if len(values) != 1:
            raise self.error(f"{key} differs from layer to layer: only equal layers can be read")
        return int(values.pop())

    def per_layer(self, key: str) -> list[int]:
        """Return a list of whole numbers, one a layer."""
        depth, length = self.integer("block_count"), self.file.length(key)
        if length != depth or not depth:
            raise self.error(f"{key} lists {length} layers, but there are {depth}")
        return list(self.file.get(key))

    def integer(self, name: str) -> int:
        value = self.optional(name)
        if value is None:
            raise self.error(f"the key {ARCHITECTURE}.{name} is missing")
        return value

    def number(self, name: str) -> float:
        key = f"{ARCHITECTURE}.{name}"
        if self.file.type_of(key) not in ("float32", "float64"):
            raise self.error(f"{key} is {self.file.type_of(key) or 'missing'}, expected a float")
        return float(self.file.get(key))


def _attention_layers(header: _Header, depth: int) -> tuple[int | None, set[int]]:
    key = f"{ARCHITECTURE}.attention.head_count_kv"
    if header.file.type_of(key) not in [f"{kind}[]" for kind in INTEGERS]:
        # One number for all layers: there is no Mamba layer.
        count = header.integer("attention.head_count_kv")
        return (count, set(range(depth))) if count else (None, set())
    counts = header.per_layer(key)
    kinds = set(counts) - {0}
    if len(kinds) > 1:
        raise header.error(
            f"its attention layers have {', '.join(map(str, sorted(kinds)))} key/value heads: "
            "config.json can only say one number for all"
        )
    return (kinds.pop() if kinds else None), {i for i, count in enumerate(counts) if count}


def _mamba_fields(header: _Header, width: int) -> dict[str, Any]:
    inner = header.integer("ssm.inner_size")
    if width < 1 or inner % width:
        raise header.error(
            f"ssm.inner_size {inner} is no multiple of embedding_length {width}: config.json can "
            "only say how many times as wide it is"
        )
    return {
        "expand": inner // width,
        "conv_width": header.integer("ssm.conv_kernel"),
        "state_size": header.integer("ssm.state_size"),
        "dt_rank": header.integer("ssm.time_step_rank"),
    }


def _own_fields(header: _Header) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in OWN_KEYS.items():
        key = f"jamba_lm.{name}"
        stored = header.file.type_of(key)
        if stored is None:
            continue
        if stored != kind or (header.file.length(key) or 0) > 1024:
            raise header.error(f"{key} is of type {stored}, expected {kind} of at most 1,024")
        value = header.file.get(key)
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _regular(
    header: _Header, kind: str, places: set[int], depth: int, own: Mapping[str, Any]
) -> dict[str, int]:
    """Say a set of layers as a period and an offset: the file's own words for it, or the least.

    One layer alone, or none, would fit many periods: then it is the depth, or the next number.
    """
    period, offset = fitted_rule(places, depth)
    period, offset = own.get(f"{kind}_period", period), own.get(f"{kind}_offset", offset)
    if not period > offset >= 0 or set(range(offset, depth, period)) != places:
        shown = ", ".join(map(str, sorted(places)[:12])) + (", ..." if len(places) > 12 else "")
        what = "attention" if kind == "attention" else "experts"
        raise header.error(
            f"layers {shown} of {depth} have {what}: config.json can only say one layer out of "
            "every so many, from a first one on, so these weights cannot be loaded"
        )
    return {f"{kind}_period": period, f"{kind}_offset": offset}


def fitted_rule(places: set[int], depth: int) -> tuple[int, int]:
    """Return the period and offset that might pick exactly these layers.

    >>> fitted_rule({4, 12, 20, 28}, 32), fitted_rule({4}, 8), fitted_rule(set(), 8)
    ((8, 4), (8, 4), (9, 8))
    """
    if not places:
        return depth + 1, depth
    ordered = sorted(places)
    gaps = [later - earlier for earlier, later in pairwise(ordered)]
    return (min(gaps) if gaps else depth), ordered[0]


def _ids(header: _Header) -> dict[str, Any]:
    def one(key: str) -> int | None:
        return header.optional(key, prefix="")

    stops = [stop for key in STOP_KEYS if (stop := one(key)) is not None]
    return {
        "bos_id": one(BOS_KEY),
        "pad_id": one(PAD_KEY),
        "eos_ids": tuple(dict.fromkeys(stops)),
    }


def _shortest(value: float) -> float:
    """Return the number with the fewest digits that is the same float32.

    >>> _shortest(struct.unpack("<f", struct.pack("<f", 1e-6))[0])
    1e-06
    """
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def header_values(config: JambaConfig) -> dict[str, Typed]:
    """Return what a GGUF file says of a model, tokenizer and name apart.

    Raises:
        CheckpointError: llama.cpp cannot compute such a model.
    """
    check_computable(config)
    plan = plan_layers(config)
    sparse = any(layer.feed_forward == "moe" for layer in plan)
    jamba: dict[str, Typed] = {
        "block_count": ("uint32", config.num_layers),
        "context_length": ("uint32", min(config.context_length, 2**31 - 1)),
        "embedding_length": ("uint32", config.d_model),
        "feed_forward_length": ("uint32", config.d_ff),
        "attention.head_count": ("uint32", config.num_heads),
        "attention.head_count_kv": (
            "int32[]",
            [config.num_kv_heads if layer.mixer == "attention" else 0 for layer in plan],
        ),
        "attention.layer_norm_rms_epsilon": ("float32", config.norm_eps),
        "ssm.conv_kernel": ("uint32", config.conv_width),
        "ssm.inner_size": ("uint32", config.d_inner),
        "ssm.state_size": ("uint32", config.state_size),
        "ssm.time_step_rank": ("uint32", config.dt_rank),
        # 0, for llama.cpp takes any other number to mean that there are experts to choose from.
        "expert_count": ("uint32", config.num_experts if sparse else 0),
        "expert_used_count": ("uint32", config.experts_per_token if sparse else 0),
        "vocab_size": ("uint32", config.vocab_size),
    }
    ids = dict(zip(STOP_KEYS, config.eos_ids, strict=False))
    ids |= {} if config.bos_id is None else {BOS_KEY: config.bos_id}
    ids |= {} if config.pad_id is None else {PAD_KEY: config.pad_id}
    return (
        {"general.architecture": ("string", ARCHITECTURE), "general.type": ("string", "model")}
        | {f"{ARCHITECTURE}.{name}": value for name, value in jamba.items()}
        | {key: ("uint32", one) for key, one in ids.items()}
        | {f"jamba_lm.{name}": (kind, getattr(config, name)) for name, kind in OWN_KEYS.items()}
    )


def check_computable(config: JambaConfig) -> None:
    """Refuse a model that llama.cpp would compute as another one, or stop at.

    Raises:
        CheckpointError: one line with every reason.
    """
    mixers = {layer.mixer for layer in plan_layers(config)}
    wrong = {
        "positions are rotary, and Jamba's attention there has none": config.position != "none",
        f"heads are {config.d_head} wide, and there d_model / num_heads is the only width": (
            config.d_head * config.num_heads != config.d_model
        ),
        f"mamba_expand is {config.expand}, and 2 is the only one there": config.expand != 2,
        "the convolution has no bias": not config.conv_bias,
        "Mamba's projections have a bias": config.proj_bias,
        "dt, B and C are not normalised": not config.inner_norms,
        f"{config.num_layers} layers, and {MAX_LAYERS} are the most": (
            config.num_layers > MAX_LAYERS
        ),
        f"{config.num_experts} experts, and {MAX_EXPERTS} are the most": (
            config.num_experts > MAX_EXPERTS
        ),
        "there is no Mamba layer": "mamba" not in mixers,
        "there is no attention layer": "attention" not in mixers,
    }
    reasons = [reason for reason, holds in wrong.items() if holds]
    if reasons:
        raise CheckpointError(
            f"llama.cpp cannot compute this model, so it has no GGUF form: {'; '.join(reasons)}"
        )
