"""What a layer of a model takes here: a few layers of its own width and random weights, timed.

Knows shapes, kinds of layers and workloads; `prediction` scales what is found to a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.memory import weight_bytes, weight_format
from jamba_lm.analysis.workload import Timing, Workload, run_in_turns
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError
from jamba_lm.kernels.packed_weights import Int4Weight, Int8Weight, PackedWeight
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initial_value
from jamba_lm.model.layout import LayerSpec, plan_layers
from jamba_lm.quantization.policy import Packing
from jamba_lm.quantization.rewrite import place_packed

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# So many tokens have a random embedding each, and route to all experts.
SAMPLE_VOCAB = 1024
# A call with this many layers of a kind, less one with a single layer, is their cost.
SAMPLE_LAYERS = 3
# A few layers of a small model stay in caches that the whole model does not fit into. So many
# copies of a sample take turns that they are as many bytes as the model, or as these, more than a
# core has of most last-level caches.
CACHED_BYTES = 64 << 20
# Samples take turns so often; each is then repeated at least so often, and for so long.
ROUNDS, FEWEST_REPEATS, SAMPLE_TIME = 3, 2, 0.15
# Values that matrices are filled with, over and over: drawing all of them would take seconds.
TILE = 1 << 20
# The share of the memory that the layers of one sample may take.
MEMORY_SHARE = 0.5

Kind = tuple[str, str]
Measure = Callable[[Sequence[LanguageModel], Workload], "Seconds"]
"""Times copies of a sample that take turns; returns the seconds of one."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one call that reads and of one that writes."""

    prefill: float
    decode: float

    def minus(self, other: Seconds) -> Seconds:
        """Return the difference; a smaller sample cannot take longer, so it is not negative."""
        return Seconds(
            max(self.prefill - other.prefill, 1e-9), max(self.decode - other.decode, 1e-9)
        )

    def times(self, factor: float) -> Seconds:
        """Return this many times as much."""
        return Seconds(self.prefill * factor, self.decode * factor)


def kind_of(spec: LayerSpec) -> Kind:
    """Return what tells layers of different cost apart."""
    return spec.mixer, spec.feed_forward


class Sampler:
    """Times layers of one kind at a time, at the model's own width.

    Attributes:
        workload: what each sample does, see `sampled_workload`.
    """

    def __init__(
        self,
        config: JambaConfig,
        weights: str,
        workload: Workload,
        measured: Measure,
    ) -> None:
        self.config = config
        self.weights = weights
        self.measured = measured
        self.workload = workload
        self.kinds = list(dict.fromkeys(kind_of(spec) for spec in plan_layers(config)))
        first = self.kinds[0]
        self._one = sample_config(config, first, 1, SAMPLE_VOCAB)
        self._many = sample_config(config, first, SAMPLE_LAYERS, SAMPLE_VOCAB)
        self._whole = sample_config(config, first, 1, config.vocab_size)
        self._two = {kind: sample_config(config, kind, 2, SAMPLE_VOCAB) for kind in self.kinds[1:]}
        samples = dict.fromkeys([self._one, self._many, self._whole, *self._two.values()])
        self._known = self._measure(list(samples))

    def layer_seconds(self) -> dict[Kind, Seconds]:
        """Return what one layer of each kind takes in the first call that reads or writes."""
        known, layer = self._known, self._first_layer()
        layers = {self.kinds[0]: layer}
        empty = known[self._one].minus(layer)
        for kind, config in self._two.items():
            layers[kind] = known[config].minus(empty).times(1 / 2)
        return layers

    def seconds_beside_layers(self) -> Seconds:
        """Return what a call takes beside its layers: the head, and the call itself."""
        return self._known[self._whole].minus(self._first_layer())

    def _first_layer(self) -> Seconds:
        more = self._known[self._many].minus(self._known[self._one])
        return more.times(1 / (SAMPLE_LAYERS - 1))

    def _measure(self, configs: Sequence[JambaConfig]) -> dict[JambaConfig, Seconds]:
        """Time all samples, in turns where there is room for all of them.

        What is wanted are differences: a machine that others slow down for some seconds must not
        slow down one sample and leave the other.
        """
        sizes = [self._num_copies(one) * weight_bytes(one, self.weights) for one in configs]
        fits = sum(sizes) <= MEMORY_SHARE * usable_memory()
        groups = [configs] if fits else [[config] for config in configs]
        found = [seconds for group in groups for seconds in self._take_turns(group)]
        return dict(zip(configs, found, strict=True))

    def _num_copies(self, config: JambaConfig) -> int:
        whole = min(weight_bytes(self.config, self.weights), CACHED_BYTES)
        return max(1, whole // weight_bytes(config, self.weights))

    def _take_turns(self, configs: Sequence[JambaConfig]) -> list[Seconds]:
        samples = [
            [sample_model(config, self.weights) for _ in range(self._num_copies(config))]
            for config in configs
        ]
        rounds = [[self.measured(one, self.workload) for one in samples] for _ in range(ROUNDS)]
        return [median_of(found) for found in zip(*rounds, strict=True)]


def median_of(found: Sequence[Seconds]) -> Seconds:
    """Return the median of each of both."""
    return Seconds(
        statistics.median(one.prefill for one in found),
        statistics.median(one.decode for one in found),
    )


def sample_config(config: JambaConfig, kind: Kind, layers: int, vocab_size: int) -> JambaConfig:
    """Return a shape of so many layers, all of one kind, as wide as `config`."""
    mixer, feed_forward = kind
    never = {"period": layers + 1, "offset": layers}
    always = {"period": 1, "offset": 0}
    attention = always if mixer == "attention" else never
    experts = always if feed_forward == "moe" else never
    return config.replace(
        num_layers=layers,
        vocab_size=min(vocab_size, config.vocab_size),
        attention_period=attention["period"],
        attention_offset=attention["offset"],
        expert_period=experts["period"],
        expert_offset=experts["offset"],
        pad_id=None,
        eos_ids=(),
    )


def sample_model(config: JambaConfig, weights: str) -> LanguageModel:
    """Make a model to be timed: matrices are filled with the same few random values.

    Raises:
        CapacityError: it does not fit into memory.
        InputError: no format is called `weights`.
    """
    form = weight_format(weights)
    dtype = DTYPES.get(weights, torch.bfloat16)
    needed = weight_bytes(config, weights)
    if needed > MEMORY_SHARE * usable_memory():
        raise CapacityError(
            f"{config.num_layers} layers of this model take {needed:,} bytes, too much of this "
            "machine's memory to be timed; its speed here cannot be predicted"
        )
    with torch.device("meta"):
        decoder = Decoder(config)
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for name, blank in list(decoder.named_parameters()):
        packing = None if form.scheme is None else form.scheme.packing(name, blank.shape)
        if form.scheme is not None and packing is not None:
            packed, rows8 = _packed(packing, blank.shape), form.scheme.rounds_rows(name)
            place_packed(decoder, name, packed, dtype, rows8=rows8)
            continue
        if blank.ndim == 2 and name.endswith(".weight"):
            value = _tiled(tile.to(dtype), blank.shape)
        else:
            value = initial_value(config, name, tuple(blank.shape), dtype, 0)
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return LanguageModel(config, decoder)


def _packed(packing: Packing, shape: torch.Size) -> PackedWeight:
    """Return a packed matrix of this shape with some values."""
    outputs, inputs = shape
    draw = torch.Generator().manual_seed(0)
    tile = torch.randint(0, 256, (TILE,), generator=draw, dtype=torch.int32).to(torch.uint8)
    if packing.group is None:
        values_OI = _tiled(tile, shape).view(torch.int8)
        return Int8Weight(values_OI, torch.full((outputs,), 2e-4))
    groups = (outputs, inputs // packing.group)
    return Int4Weight(
        _tiled(tile, torch.Size((outputs, inputs // 2))),
        torch.full(groups, 4e-3, dtype=torch.bfloat16),
        torch.full(groups, -3e-2, dtype=torch.bfloat16),
    )


def _tiled(tile: Tensor, shape: torch.Size) -> Tensor:
    x = torch.empty(shape, dtype=tile.dtype)
    for part in x.view(-1).split(len(tile)):
        part.copy_(tile[: len(part)])
    return x


def sample_seconds(copies: Sequence[LanguageModel], workload: Workload) -> Seconds:
    """Time one reading call and one writing call: medians of several repetitions."""
    run_in_turns(copies, workload)
    timings: list[Timing] = []
    begun = time.perf_counter()
    while len(timings) < FEWEST_REPEATS or time.perf_counter() - begun < SAMPLE_TIME:
        timings.append(run_in_turns(copies, workload))
    return Seconds(
        prefill=statistics.median(timing.prefill_seconds for timing in timings),
        decode=statistics.median(timing.decode_seconds for timing in timings)
        / workload.num_new_tokens,
    )
