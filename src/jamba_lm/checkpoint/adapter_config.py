"""PEFT's adapter_config.json, read strictly: what would change the computation unseen is refused.

Knows names and numbers, and no tensors.

Source: peft 0.21, `tuners/lora/config.py` (fields), `utils/other.py` (`get_pattern_key`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jamba_lm.config_json import shown
from jamba_lm.errors import CheckpointError
from jamba_lm.files import read_json

NAME = "adapter_config.json"
MOST_PATTERNS = 1000

# Fields that say where an adapter comes from, how it was trained or where it belongs. Which modules
# it has is read from its tensors.
WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("peft_version", "lora_dropout", "target_modules", "target_parameters"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("init_lora_weights", "bias", "lora_ga_config", "corda_config", "loftq_config"),
        *("ensure_weight_tying", "monteclora_config", "velora_config"),
    }
)
# Ways of initialisation that leave the model's own weights alone.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# A pattern may be a name, or a regular expression of the simple kind that peft itself writes.
PATTERN = re.compile(r"\^?(?:\.\*|\\\.|\\d\+|\[0-9\]\+|\(\?:|[\w.|()])+\$?")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What must be known to use the tensors of an adapter.

    Attributes:
        rank: of every matrix that `rank_pattern` does not name.
        alpha: likewise.
        rank_pattern: ranks by pattern of module or parameter names.
        alpha_pattern: likewise.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        target_parameters: stacked parameters that have adapters, as the file names them.
        base: the model that the adapter was made for, as the file says.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    target_parameters: tuple[str, ...] = ()
    base: str | None = None

    def rank_of(self, name: str) -> int:
        """Return the rank that the file gives the module or parameter of this public name."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """Return what the product of the two factors is multiplied by."""
        rank = self.rank_of(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (
            rank**0.5 if self.rslora else rank
        )


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def read_settings(folder: Path) -> AdapterSettings:
    """Read the adapter_config.json of a folder.

    Raises:
        CheckpointError: it is missing or malformed, not of a LoRA adapter, or asks for something
            that is not supported; the message names it.
    """
    path = folder / NAME
    values = read_json(path, "adapter configuration", CheckpointError)
    where = f"{str(path)!r}"
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where} has peft_type {shown(kind)}: only LORA adapters are supported, so merge it "
            "with peft and load the result"
        )
    if values.get("use_dora"):
        raise CheckpointError(
            f"{where} says use_dora: DoRA adapters are not supported, so merge it with peft "
            "(merge_and_unload) and load the result"
        )
    start = values.get("init_lora_weights")
    if not any(start is one or start == one for one in PLAIN_STARTS):
        raise CheckpointError(
            f"{where} says init_lora_weights {shown(start)}, which changes the model's own "
            "weights: convert the adapter to plain LoRA (peft's "
            "path_initial_model_for_weight_conversion does) or merge it with peft"
        )
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where} says bias {shown(values['bias'])}: trained biases are not supported, so "
            "merge the adapter with peft and load the result"
        )
    for key, value in values.items():
        if key not in WITHOUT_EFFECT and value not in (None, False, {}, []):
            raise CheckpointError(
                f"{where} says {shown(key)} {shown(value)}, which is not supported: merge the "
                "adapter with peft and load the result"
            )
    base = values.get("base_model_name_or_path")
    return AdapterSettings(
        rank=_number(values.get("r", 8), "r", where, whole=True),
        alpha=_number(values.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern=_patterns(values.get("rank_pattern"), "rank_pattern", where, whole=True),
        alpha_pattern=_patterns(values.get("alpha_pattern"), "alpha_pattern", where),
        rslora=_truth(values.get("use_rslora"), "use_rslora", where),
        target_parameters=_names(values.get("target_parameters"), "target_parameters", where),
        base=base if isinstance(base, str) and base else None,
    )


def _number(value: Any, key: str, where: str, *, whole: bool = False) -> Any:
    good = isinstance(value, int) or (isinstance(value, float) and not whole)
    if not good or isinstance(value, bool) or not 0 < value < 1e9:
        kind = "a whole number" if whole else "a number"
        raise CheckpointError(f"{where} says {key} {shown(value)}: expected {kind} above 0")
    return value


def _truth(value: Any, key: str, where: str) -> bool:
    if value not in (None, True, False):
        raise CheckpointError(f"{where} says {key} {shown(value)}: expected true or false")
    return bool(value)


def _names(value: Any, key: str, where: str) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"{where} says {key} {shown(value)}: expected a list of names")
    return tuple(names)


def _patterns(value: Any, key: str, where: str, *, whole: bool = False) -> dict[str, Any]:
    patterns = value or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise CheckpointError(
            f"{where} says {key} {shown(value)}: expected an object of at most "
            f"{MOST_PATTERNS:,} patterns and numbers"
        )
    for pattern, number in patterns.items():
        _number(number, f"{key}[{shown(pattern)}]", where, whole=whole)
        # Nothing here can be repeated within a repetition, so that matching stays quick.
        if not PATTERN.fullmatch(pattern) or pattern.count("*") > 2 or len(pattern) > 200:
            raise CheckpointError(
                f"{where} says {key} for {shown(pattern)}: expected the name of a module, or a "
                "pattern with no more than .* and alternatives in it"
            )
        try:
            re.compile(pattern)
        except re.error as cause:
            raise CheckpointError(
                f"{where} says {key} for {shown(pattern)}, which is no pattern: {cause}"
            ) from cause
    return patterns
