"""Every number that defines a model. Needs no torch, and knows no weights.

`JambaConfig` is the paper's dials and sizes. By config alone it is every arm that the paper
compares: only attention, only Mamba, any ratio between, with and without experts, positions and
inner norms.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from jamba_lm import config_json
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import ConfigError
from jamba_lm.files import MIB, make_folder, path_kind, read_json, write_json

Position = Literal["none", "rope"]

# What a field may be, inclusive. The upper bounds are far above any model that exists: they keep a
# damaged file from asking for absurd memory before anything can look at the weights.
_INTEGERS: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "d_model": (1, 2**20),
    "d_ff": (1, 2**24),
    "num_layers": (1, 10_000),
    "num_heads": (1, 2**16),
    "num_kv_heads": (1, 2**16),
    "d_head": (1, 2**16),
    "attention_period": (1, 2**20),
    "attention_offset": (0, 2**20),
    "expert_period": (1, 2**20),
    "expert_offset": (0, 2**20),
    "num_experts": (1, 2**16),
    "experts_per_token": (1, 2**16),
    "state_size": (1, 2**16),
    "conv_width": (2, 256),
    "expand": (1, 256),
    "dt_rank": (1, 2**20),
    "context_length": (1, 2**40),
}
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "rope_theta": (1.0, 1e12),
    "norm_eps": (1e-30, 1.0),
    "initializer_range": (0.0, 1e3),
    "aux_loss_coef": (0.0, 1e6),
}
_FLAGS = ("conv_bias", "proj_bias", "inner_norms", "tie_embeddings")
_DERIVED = ("d_head", "dt_rank")
_PUBLIC_NAMES = {ours: public for public, ours in config_json.FIELDS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class JambaConfig:
    """The shape of a model; the defaults are Jamba v0.1.

    Layer `i` mixes tokens by attention where `i` divided by `attention_period` leaves
    `attention_offset`, by Mamba elsewhere; it is a mixture of experts where `i` divided by
    `expert_period` leaves `expert_offset` and `num_experts` exceeds 1, a plain MLP elsewhere.
    Only attention is `attention_period=1, attention_offset=0`. Only Mamba is a period and offset
    beyond the last layer: `attention_period=num_layers + 1, attention_offset=num_layers`.

    `d_head` and `dt_rank` may be left out: they are then `d_model // num_heads` and
    `ceil(d_model / 16)`, and after construction they are always integers.

    Paper: Jamba (arXiv 2403.19887) section 2 and 3.1. Names and defaults of `config.json`:
    transformers' `JambaConfig`.

    Attributes:
        vocab_size: rows of the embedding.
        d_model: width of the residual stream.
        d_ff: inner width of an MLP, and of one expert.
        num_kv_heads: key/value heads; a divisor of `num_heads`.
        state_size: the scan's state per channel (the paper's N).
        conv_width: taps of the causal convolution.
        expand: Mamba channels per unit of `d_model`.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether Mamba's input and output projections have a bias.
        inner_norms: whether dt, B and C are normalised; what Jamba adds to Mamba.
        position: "none", or "rope" for rotary positions in the attention layers.
        rope_theta: base of the rotary frequencies; only with `position="rope"`.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of fresh matrices.
        aux_loss_coef: weight of the experts' balance loss in training.
        pad_id: token whose embedding starts at zero, or None.
        bos_id: token that starts every text, or None.
        eos_ids: tokens that end a text.
        context_length: longest context that the model was made for, in tokens; no limit is
            enforced.

    Raises:
        ConfigError: a value has the wrong type, is out of range or contradicts another.
    """

    vocab_size: int = 65536
    d_model: int = 4096
    d_ff: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    # The type is what every reader sees: None is only the way to leave the number out.
    d_head: int = None  # type: ignore[assignment]
    attention_period: int = 8
    attention_offset: int = 4
    expert_period: int = 2
    expert_offset: int = 1
    num_experts: int = 16
    experts_per_token: int = 2
    state_size: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int = None  # type: ignore[assignment]
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = True
    position: Position = "none"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    aux_loss_coef: float = 0.001
    pad_id: int | None = 0
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    context_length: int = 262144

    def __post_init__(self) -> None:
        """Fill in what was left out, then check types and ranges, then what must fit together."""
        for name, (low, high) in _INTEGERS.items():
            if not (name in _DERIVED and getattr(self, name) is None):
                _check_integer(name, getattr(self, name), low, high)
        for name, value in derived(self.d_model, self.num_heads).items():
            if getattr(self, name) is None:
                _check_integer(name, value, *_INTEGERS[name])
                object.__setattr__(self, name, value)
        for name, bounds in _NUMBERS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), *bounds))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{_say(name, getattr(self, name))}, expected true or false")
        self._check_pattern()
        self._check_attention()
        self._check_ids()

    def _check_pattern(self) -> None:
        for kind in ("attention", "expert"):
            period, offset = getattr(self, f"{kind}_period"), getattr(self, f"{kind}_offset")
            if offset >= period:
                raise ConfigError(
                    f"{_say(f'{kind}_offset', offset)}, expected 0 to {period - 1}: "
                    f"it picks one layer out of every {kind}_period={period}"
                )
        if self.num_experts > 1 and self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{_say('experts_per_token', self.experts_per_token)}, expected at most "
                f"num_experts={self.num_experts}"
            )

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}: every key/value head serves equally many heads"
            )
        if self.position not in ("none", "rope"):
            raise ConfigError(f"position={shown(self.position)}, expected 'none' or 'rope'")
        if self.position == "rope" and self.d_head % 2:
            raise ConfigError(
                f"{_say('d_head', self.d_head)}, expected an even number: "
                "rotary positions turn pairs of values"
            )
        if self.position == "none" and self.rope_theta != 10000.0:
            raise ConfigError(
                f"rope_theta={self.rope_theta} without position='rope' would have no effect; "
                "set position or leave rope_theta out"
            )

    def _check_ids(self) -> None:
        if isinstance(self.eos_ids, list):
            object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        if not isinstance(self.eos_ids, tuple):
            raise ConfigError(f"{_say('eos_ids', self.eos_ids)}, expected a list of token ids")
        if len(self.eos_ids) > 1024:
            raise ConfigError(f"eos_ids holds {len(self.eos_ids)} ids, expected at most 1024")
        for name, value in [("pad_id", self.pad_id), ("bos_id", self.bos_id)]:
            if value is not None:
                _check_integer(name, value, 0, self.vocab_size - 1)
        for value in self.eos_ids:
            _check_integer("eos_ids", value, 0, self.vocab_size - 1)

    @property
    def d_inner(self) -> int:
        """Width of a Mamba mixer: its number of channels."""
        return self.expand * self.d_model

    @property
    def is_public(self) -> bool:
        """Whether transformers, vLLM and llama.cpp compute this model too."""
        return self.position == "none" and self.inner_norms

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        A `d_head` or `dt_rank` that follows from the width keeps following it: halving `d_model`
        halves both, unless the call names them or they had been chosen freely.

        >>> JambaConfig().replace(d_model=2048).dt_rank
        128

        Raises:
            ConfigError: an unknown field, or an impossible result.
        """
        _check_names(changes)
        for name, value in derived(self.d_model, self.num_heads).items():
            if getattr(self, name) == value:
                changes.setdefault(name, None)
        return dataclasses.replace(self, **changes)

    def with_set(self, assignments: Iterable[str]) -> Self:
        """Return a copy changed by texts like `d_ff=128`, as a command line gives them.

        Booleans are `true` and `false`, lists are separated by commas, and `none` or `auto`
        leaves a number out where that is allowed.

        >>> JambaConfig().with_set(["d_ff=128", "eos_ids=2,518"]).eos_ids
        (2, 518)

        Raises:
            ConfigError: not an assignment, an unknown field, an unreadable or impossible value.
        """
        changes: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(
                    f"cannot understand {shown(assignment)}: expected NAME=VALUE, like d_ff=128"
                )
            _check_names([name.strip()])
            changes[name.strip()] = _parse(name.strip(), text.strip())
        return self.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, under our names; `from_dict` reads them back."""
        values = {name: getattr(self, name) for name in _names()}
        return values | {"eos_ids": list(self.eos_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values under our names.

        Raises:
            ConfigError: a key is unknown (the message names the closest known one), or the values
                are impossible.
        """
        _check_names(values)
        return cls(**values)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from the content of a Hugging Face `config.json`.

        Raises:
            ConfigError: see `config_json.read_fields`; or the values are impossible.
        """
        fields = config_json.read_fields(values)
        if fields.get("num_kv_heads", 0) is None:
            fields["num_kv_heads"] = fields.get("num_heads", cls().num_heads)
        config = cls(**fields)
        config_json.check_patterns(values, config_json.write_patterns(config.to_dict()))
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a Hugging Face `config.json`.

        What transformers cannot compute (rotary positions, no inner norms) is written under the
        model type "jamba_lm", which it refuses, instead of as something else that it accepts.
        """
        return config_json.write_fields(self.to_dict(), own=not self.is_public)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a checkpoint folder's `config.json`, or the file itself.

        Raises:
            ConfigError: there is none, or it cannot be read as a Jamba model.
        """
        return cls.from_hf(read_config_json(path))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` into `folder`, which is made if need be.

        Raises:
            InputError: the operating system refused.
        """
        make_folder(folder)
        write_json(Path(folder) / "config.json", self.to_hf())


def read_config_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a folder's `config.json`, or of the file itself, uninterpreted.

    Raises:
        ConfigError: there is none, or it is not one JSON object.
    """
    file = Path(path)
    if path_kind(file) == "folder":
        file = file / "config.json"
    return read_json(file, "model configuration", ConfigError, limit_bytes=MIB)


def derived(d_model: int, num_heads: int) -> dict[str, int]:
    """Return what `d_head` and `dt_rank` are when they are left out.

    Source: transformers' `configuration_jamba.py` and `modeling_jamba.py`; a width that is not a
    multiple of the heads is rounded down, as there.
    """
    return {"d_head": d_model // num_heads, "dt_rank": math.ceil(d_model / 16)}


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(JambaConfig)]


def _check_names(names: Iterable[object]) -> None:
    known = _names()
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown configuration key {shown(name)}{closest(name, known)}")


def _say(name: str, value: object) -> str:
    """Write `name=value`, adding what `config.json` calls it, since that is where people look."""
    public = _PUBLIC_NAMES.get(name, name)
    return f"{name}={shown(value)}" + (f" ({public} in config.json)" if public != name else "")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    # True is an int to Python, and a mistake in a file.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{_say(name, value)}, expected a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> float:
    # NaN fails the comparison as well.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{_say(name, value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def _parse(name: str, text: str) -> Any:
    """Read the text of one field, by the type that the field has."""
    try:
        if name in (*_DERIVED, "pad_id", "bos_id") and text in ("none", "auto"):
            return None
        if name in _INTEGERS or name in ("pad_id", "bos_id"):
            return int(text)
        if name in _NUMBERS:
            return float(text)
        if name == "eos_ids":
            return tuple(int(part) for part in text.strip("[]").split(",") if part.strip())
        return {"true": True, "false": False}[text] if name in _FLAGS else text
    except (ValueError, KeyError) as error:
        kind = "true or false" if name in _FLAGS else "a number"
        raise ConfigError(f"cannot read {name}={shown(text)}: expected {kind}") from error
