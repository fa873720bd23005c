"""What one call of a model must do at least: bytes to read and operations to compute. No torch.

An operation can be no faster than its bytes through the memory, nor than its arithmetic through
the processor: the larger of the two is its floor. Knows no implementation; how close ours comes is
measured (`prediction`).

M rows of one call, D model width, C Mamba channels, N state size, W convolution taps, H query
heads, G key/value heads, P head width, X experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jamba_lm.analysis.memory import WeightFormat, tensor_bytes, weight_format
from jamba_lm.analysis.tensors import TensorGroup, list_tensors
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import LayerSpec, plan_layers

# The parts of a forward pass, in its order; a profile has a row for each.
Part = Literal[
    "embedding",
    "norms",
    "Mamba projections",
    "convolution",
    "scan",
    "attention projections",
    "attention",
    "MLP",
    "router",
    "experts",
    "head",
]
# Which limit of the processor arithmetic is held against: matrix products by the type of their
# inputs, and the scan, whose operations are state updates.
Unit = Literal["fp32", "bf16", "int8", "scan"]


@dataclass(frozen=True, slots=True)
class Call:
    """One forward call: sequences of equal length, and what each has read before.

    Attributes:
        sequences: in the call.
        tokens: of each sequence in this call.
        past: tokens of each sequence before it.
    """

    sequences: int
    tokens: int
    past: int

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.tokens


@dataclass(frozen=True, slots=True)
class Work:
    """What one part of a call must do.

    Attributes:
        part: whose work it is.
        num_bytes: that must come from memory, or go there: weights, states, keys and values.
            Activations are not counted: they stay in the caches.
        amount: multiplications and additions, each counted; state updates for the scan.
        unit: in which limit `amount` is held against.
        operation: which of the part's operations this is, where they are told apart: the
            projections of a mixer; else the part itself.
    """

    part: Part
    num_bytes: float
    amount: float
    unit: Unit
    operation: str

    def floor(self, speeds: Speeds) -> float:
        """Return the seconds that this takes at least."""
        return max(self.num_bytes / speeds.read_bytes, self.amount / speeds.amounts[self.unit])

    def reads_longer(self, speeds: Speeds) -> bool:
        """Say whether memory is what limits this, and not arithmetic."""
        return self.num_bytes / speeds.read_bytes >= self.amount / speeds.amounts[self.unit]


@dataclass(frozen=True, slots=True)
class Speeds:
    """The limits of a machine with a number of threads.

    Attributes:
        threads: computing at once.
        read_bytes: from memory in a second.
        amounts: operations a second for each unit.
    """

    threads: int
    read_bytes: float
    amounts: Mapping[Unit, float]


def floor_seconds(works: Iterable[Work], speeds: Speeds) -> float:
    """Return the seconds that all parts take at least, one after the other."""
    return sum(work.floor(speeds) for work in works)


def experts_touched(config: JambaConfig, rows: int) -> float:
    """Return how many experts of a mixture `rows` tokens use, when they are used evenly.

    >>> experts_touched(JambaConfig(), 1)
    2.0
    >>> round(experts_touched(JambaConfig(), 8), 1)
    10.5
    """
    share = config.experts_per_token / config.num_experts
    return float(config.num_experts * (1 - (1 - share) ** rows))


def model_work(config: JambaConfig, call: Call, weights: str) -> list[Work]:
    """List the work of a forward call that returns logits for the last token of each sequence.

    A decode step of Jamba v0.1 multiplies by its 12 billion active parameters, less the embedding
    of which one row is read:

    >>> works = model_work(JambaConfig(), Call(1, 1, 0), "bf16")
    >>> round(sum(work.amount for work in works if work.unit == "bf16") / 2e9, 2)
    11.84
    """
    works = [head_work(config, call, weights)]
    for spec in plan_layers(config):
        works += layer_work(config, spec, call, weights)
    return _merged(works)


def head_work(config: JambaConfig, call: Call, weights: str) -> Work:
    """Return the work of the logits of each sequence's last token."""
    form = weight_format(weights)
    values = config.vocab_size * config.d_model
    # A tied head is the embedding's matrix, in its format.
    (matrix,) = (
        group
        for group in list_tensors(config)
        if group.part == ("embedding" if config.tie_embeddings else "head")
    )
    unit = _unit(form, matrix)
    amount = 2.0 * call.sequences * values
    return _work("head", tensor_bytes(matrix, form), amount, unit)


def layer_work(config: JambaConfig, spec: LayerSpec, call: Call, weights: str) -> list[Work]:
    """List the work of one layer."""
    form = weight_format(weights)
    mixers = {"mamba": _mamba, "attention": _attention}
    works = mixers[spec.mixer](config, call, form)
    if spec.feed_forward == "moe":
        works += _mixture(config, call, form)
    else:
        works += _products(config, form, "MLP", call.rows, "MLP")
    norm_bytes = 2.0 * config.d_model * form.bytes_per_value
    works.append(_work("norms", norm_bytes, 0.0, "fp32"))
    return works


def _mamba(config: JambaConfig, call: Call, form: WeightFormat) -> list[Work]:
    C, N, W = config.d_inner, config.state_size, config.conv_width
    width = form.bytes_per_value
    scan_state = 2.0 * 4 * call.sequences * C * N
    conv_state = 2.0 * width * call.sequences * C * (W - 1)
    return [
        *_products(config, form, "Mamba projections", call.rows, "Mamba"),
        _work("convolution", conv_state + C * (W + 1) * width, 2.0 * call.rows * C * W, "fp32"),
        _work("scan", scan_state + 4.0 * C * (N + 1), float(call.rows * C * N), "scan"),
    ]


def _attention(config: JambaConfig, call: Call, form: WeightFormat) -> list[Work]:
    H, G, P = config.num_heads, config.num_kv_heads, config.d_head
    seen = call.past + call.tokens
    # Each token looks back to the start of its sequence and to itself.
    pairs = call.sequences * (call.tokens * call.past + call.tokens * (call.tokens + 1) / 2)
    cache = 2.0 * call.sequences * seen * G * P * form.bytes_per_value
    return [
        *_products(config, form, "attention projections", call.rows, "attention"),
        _work("attention", cache, 4.0 * pairs * H * P, _unit(form, None)),
    ]


def _mixture(config: JambaConfig, call: Call, form: WeightFormat) -> list[Work]:
    rows = call.rows * config.experts_per_token
    read = experts_touched(config, call.rows)
    return [
        *_products(config, form, "router", call.rows, "router"),
        *_products(config, form, "experts", rows, "experts", copies_read=read),
    ]


def _products(
    config: JambaConfig,
    form: WeightFormat,
    part: Part,
    rows: float,
    tensor_part: str,
    copies_read: float = 1.0,
) -> list[Work]:
    """List the work of one layer's matrices of a part, each multiplied by `rows` rows in all."""
    groups = [group for group in _matrices(config) if group.part == tensor_part]
    works = [
        Work(
            part,
            copies_read * tensor_bytes(group, form),
            2.0 * rows * group.values,
            _unit(form, group),
            _operation(part, group),
        )
        for group in groups
    ]
    return _merged(works)


def _operation(part: Part, group: TensorGroup) -> str:
    """Name the projection of a mixer that a matrix is; those of one input are one operation."""
    if not group.name.startswith("mixer."):
        return part
    name = group.name.removeprefix("mixer.").removesuffix(".weight")
    return "qkv_proj" if name in ("q_proj", "k_proj", "v_proj") else name


def _work(part: Part, num_bytes: float, amount: float, unit: Unit) -> Work:
    """Return the work of a part of one operation."""
    return Work(part, num_bytes, amount, unit, part)


@functools.lru_cache(maxsize=16)
def _matrices(config: JambaConfig) -> tuple[TensorGroup, ...]:
    """List the matrices that rows are multiplied by in layers, those of every kind of layer."""
    # An attention layer with a mixture of experts, and a Mamba layer with an MLP.
    both = config.replace(
        num_layers=2, attention_period=2, attention_offset=0, expert_period=2, expert_offset=0
    )
    names = ("_proj.weight", "router.weight")
    return tuple(group for group in list_tensors(both) if group.name.endswith(names))


def _unit(form: WeightFormat, group: TensorGroup | None) -> Unit:
    """Return what a product with the matrices of `group`, or with activations, is limited by."""
    if group is not None and form.packing(group) is not None:
        return "int8"
    return "fp32" if form.bytes_per_value == 4 else "bf16"


def _merged(works: Iterable[Work]) -> list[Work]:
    """Add up the work of each operation and unit."""
    sums: dict[tuple[str, Unit], Work] = {}
    for work in works:
        key = (work.operation, work.unit)
        before = sums.get(key, replace(work, num_bytes=0.0, amount=0.0))
        sums[key] = replace(
            before,
            num_bytes=before.num_bytes + work.num_bytes,
            amount=before.amount + work.amount,
        )
    return list(sums.values())
