"""What a model takes: parameters, and bytes of weights, caches and states. Needs no torch.

All numbers are exact except one, which says so: the activations of a long call. Knows nothing of
speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jamba_lm.analysis.tensors import Part, TensorGroup, list_tensors
from jamba_lm.config import JambaConfig
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import InputError
from jamba_lm.model.layout import Mixer, plan_layers
from jamba_lm.quantization.policy import Packing, Scheme, all_schemes

GIB = 1024**3

ACTIVATION_BYTES_PER_UNIT = 48
"""Estimated bytes alive per token of a call and unit of `d_model`, at 16 bits.

The one number that makes the paper's Figure 2 come out (140K tokens of Jamba at 8 bits on one
80 GB GPU, a prompt read in one call): about 24 vectors of 16 bits. It was fitted to that figure,
so the figure does not confirm it.
"""

CACHE_ROOM_TOKENS = 4096
"""The most tokens that a sequence's cache keeps room for before they come."""


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters a model has, and how many of them one token uses, part by part."""

    total_by_part: Mapping[Part, int]
    active_by_part: Mapping[Part, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.total_by_part.values())

    @property
    def active(self) -> int:
        """The parameters that one token uses."""
        return sum(self.active_by_part.values())


def parameter_counts(config: JambaConfig) -> ParameterCounts:
    """Count the parameters of a model, exactly.

    Paper: Jamba, Table 1 (52B, 12B active) and Jamba-1.5, Table 1 (398B, 94B active).

    >>> v01 = parameter_counts(JambaConfig())
    >>> v01.total, v01.active
    (51570323328, 12110311296)
    >>> from jamba_lm.presets import PRESETS
    >>> parameter_counts(PRESETS["jamba-reasoning-3b"]).total
    3029337472
    >>> large = parameter_counts(PRESETS["jamba-1.5-large"])
    >>> large.total, large.active
    (398555145696, 94149338592)
    """
    total: dict[Part, int] = {}
    active: dict[Part, int] = {}
    for group in list_tensors(config):
        total[group.part] = total.get(group.part, 0) + group.copies * group.values
        active[group.part] = active.get(group.part, 0) + group.active_copies * group.values
    return ParameterCounts(MappingProxyType(total), MappingProxyType(active))


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How weights are kept in memory, and in files.

    Attributes:
        description: for a person.
        bytes_per_value: of the tensors that are not packed, of keys, values and the convolution's
            window.
        scheme: which matrices are packed into 8 or 4 bits; None when none is.
    """

    description: str
    bytes_per_value: int
    scheme: Scheme | None = None

    def packing(self, group: TensorGroup) -> Packing | None:
        """Return how the tensors of `group` are packed, or None when they are not."""
        return None if self.scheme is None else self.scheme.packing(group.name, group.shape)


WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        "fp32": WeightFormat("32-bit floats", 4),
        "bf16": WeightFormat("16-bit bfloat16", 2),
        "fp16": WeightFormat("16-bit float16", 2),
        **{
            scheme.label: WeightFormat(f"{scheme.description}; the rest in 16 bits", 2, scheme)
            for scheme in all_schemes()
        },
    }
)


def weight_format(name: str) -> WeightFormat:
    """Return the format called `name`.

    Raises:
        InputError: there is none; the message names them all.
    """
    if name not in WEIGHT_FORMATS:
        raise InputError(
            f"no weight format {shown(name)} among {', '.join(WEIGHT_FORMATS)}"
            f"{closest(name, WEIGHT_FORMATS)}"
        )
    return WEIGHT_FORMATS[name]


def weight_bytes(config: JambaConfig, weights: str = "bf16") -> int:
    """Size of the weights in memory, in bytes.

    Mamba's A_log and D stay in float32 in every format.

    >>> weight_bytes(JambaConfig(), "fp32") == 4 * parameter_counts(JambaConfig()).total
    True
    >>> round(weight_bytes(JambaConfig(), "int8") / GIB, 2)
    48.13
    """
    form = weight_format(weights)
    return sum(group.copies * tensor_bytes(group, form) for group in list_tensors(config))


def tensor_bytes(group: TensorGroup, form: WeightFormat) -> int:
    """Size of one tensor of `group` in a format, in bytes."""
    packing = form.packing(group)
    if packing is not None:
        return packing.num_bytes(group.shape)
    return (4 if group.wide else form.bytes_per_value) * group.values


def kv_cache_bytes(
    config: JambaConfig, *, tokens: int, batch: int = 1, bytes_per_value: int = 2
) -> int:
    """Size of the key/value cache, in bytes.

    Only attention layers keep keys and values, so one attention layer in eight means one eighth of
    a Transformer's cache.

    Paper: Jamba, Table 1 (256K tokens at 16 bits; its GB are GiB, its K is 1024).

    >>> from jamba_lm.analysis.comparators import COMPARATORS
    >>> models = [JambaConfig(), *(COMPARATORS[n] for n in ("mistral-7b", "mixtral-8x7b"))]
    >>> [kv_cache_bytes(m, tokens=256 * 1024) / GIB for m in models]
    [4.0, 32.0, 32.0]
    >>> kv_cache_bytes(COMPARATORS["llama-2-7b"], tokens=256 * 1024) / GIB
    128.0
    """
    values_per_token = 2 * config.num_kv_heads * config.d_head
    return _num_layers(config, "attention") * batch * tokens * values_per_token * bytes_per_value


def scan_state_bytes(config: JambaConfig, *, batch: int = 1) -> int:
    """Size of the Mamba layers' recurrent states, in bytes: float32, whatever the model's dtype.

    >>> scan_state_bytes(JambaConfig()) / 1024**2
    14.0
    """
    return _num_layers(config, "mamba") * batch * config.d_inner * config.state_size * 4


def conv_state_bytes(config: JambaConfig, *, batch: int = 1, bytes_per_value: int = 2) -> int:
    """Size of the Mamba layers' convolution windows, in bytes: the last `conv_width - 1` inputs.

    >>> conv_state_bytes(JambaConfig()) / 1024**2
    1.3125
    """
    window = config.d_inner * (config.conv_width - 1) * bytes_per_value
    return _num_layers(config, "mamba") * batch * window


def mamba_state_bytes(config: JambaConfig, *, batch: int = 1, conv_bytes_per_value: int = 2) -> int:
    """Size of all Mamba states, in bytes: independent of the number of tokens.

    >>> mamba_state_bytes(JambaConfig())
    16056320
    """
    return scan_state_bytes(config, batch=batch) + conv_state_bytes(
        config, batch=batch, bytes_per_value=conv_bytes_per_value
    )


def _num_layers(config: JambaConfig, mixer: Mixer) -> int:
    return sum(layer.mixer == mixer for layer in plan_layers(config))


def activation_bytes(config: JambaConfig, *, rows: int, bytes_per_value: int = 2) -> int:
    """Estimate what a call of `rows` tokens needs beside weights and states, in bytes.

    The only number here that is not exact; see `ACTIVATION_BYTES_PER_UNIT`.
    """
    return rows * config.d_model * ACTIVATION_BYTES_PER_UNIT * bytes_per_value // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What it takes to run a model, in bytes.

    Attributes:
        tokens: per sequence.
        batch: sequences.
        kv_cache: what is remembered; a cache may hold room for up to `CACHE_ROOM_TOKENS` more
            tokens of each sequence.
        activations: an estimate, and zero when no call length was given; the rest is exact.
    """

    tokens: int
    batch: int
    weights: int
    kv_cache: int
    scan_states: int
    conv_states: int
    activations: int

    @property
    def exact(self) -> int:
        """Bytes that are certain to be needed."""
        return self.weights + self.kv_cache + self.scan_states + self.conv_states

    @property
    def total(self) -> int:
        """Bytes that are certain to be needed, and the estimate on top."""
        return self.exact + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRates:
    """What a model costs per thing that is held, in bytes; all that planning needs to know of it.

    Attributes:
        weights: once.
        kv_cache: per token of every sequence.
        scan_state: per sequence.
        conv_state: per sequence.
        activations: per row of one call, estimated.
    """

    weights: int
    kv_cache: int
    scan_state: int
    conv_state: int
    activations: int

    def plan(self, *, tokens: int, batch: int = 1, chunk: int | None = 0) -> MemoryPlan:
        """Add up what `batch` sequences of `tokens` tokens need.

        Args:
            tokens: per sequence, prompt and answer together.
            batch: sequences.
            chunk: most tokens of one sequence in one call, to estimate activations from; 0 leaves
                them out, None reads whole prompts in one call.
        """
        rows = batch * (tokens if chunk is None else min(chunk, tokens))
        return MemoryPlan(
            tokens=tokens,
            batch=batch,
            weights=self.weights,
            kv_cache=batch * tokens * self.kv_cache,
            scan_states=batch * self.scan_state,
            conv_states=batch * self.conv_state,
            activations=rows * self.activations,
        )


def memory_rates(config: JambaConfig, weights: str = "bf16") -> MemoryRates:
    """Return what a model costs when its weights are kept in the format called `weights`.

    >>> memory_rates(JambaConfig()).plan(tokens=256 * 1024).kv_cache / GIB
    4.0

    Raises:
        InputError: no such weight format.
    """
    width = weight_format(weights).bytes_per_value
    return MemoryRates(
        weights=weight_bytes(config, weights),
        kv_cache=kv_cache_bytes(config, tokens=1, bytes_per_value=width),
        scan_state=scan_state_bytes(config),
        conv_state=conv_state_bytes(config, bytes_per_value=width),
        activations=activation_bytes(config, rows=1, bytes_per_value=width),
    )


SEARCH_LIMIT = 2**40
"""What fits beyond this many tokens or sequences is as good as unlimited."""


def largest_fit(bytes_for: Callable[[int], int], memory: int) -> int | None:
    """Find the largest number whose bytes fit into `memory`.

    Args:
        bytes_for: bytes of a number of tokens or sequences; never falls when the number rises.
        memory: bytes.

    Returns:
        The number, 0 when not even 1 fits, None when `SEARCH_LIMIT` fits.

    >>> largest_fit(lambda number: 10 + 3 * number, 100)
    30
    """
    if bytes_for(SEARCH_LIMIT) <= memory:
        return None
    fits, fails = 0, SEARCH_LIMIT
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if bytes_for(middle) <= memory:
            fits = middle
        else:
            fails = middle
    return fits
