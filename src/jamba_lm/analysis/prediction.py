"""How fast a model will be on this machine, from a few of its layers.

A prediction is the model's roofline over the share of it that our code reaches here. The roofline
is arithmetic on the config and the measured limits of the machine. The share is measured at this
moment, with layers of the model's own width and random weights, one kind at a time, run through the
same calls as the model; what a call costs beside its layers is measured with them. So no speed is
written into the code, and a model need not be there to be predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from jamba_lm.analysis.layer_samples import (
    Kind,
    Measure,
    Sampler,
    Seconds,
    kind_of,
    sample_seconds,
)
from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.machine_speed import LARGEST_SET, measure_speeds
from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.analysis.roofline import (
    Call,
    Speeds,
    floor_seconds,
    layer_work,
    model_work,
)
from jamba_lm.analysis.workload import Workload
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError
from jamba_lm.model.layout import plan_layers

# Tokens that a sample writes: the first ones meet cold caches, and a mean over few is not one over
# an answer. At least so many, and as many as the whole model could write in so long.
FEWEST_NEW_TOKENS, WRITING_TIME = 12, 0.1


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a workload, predicted.

    Attributes:
        tokens: that it reads or writes, of all sequences.
        floor_seconds: what its roofline says, no implementation can be faster.
        seconds: predicted.
        memory_share: how much of the floor is time of the memory, not of arithmetic.
        parts: the floor of each part of the model, in seconds.
    """

    tokens: int
    floor_seconds: float
    seconds: float
    memory_share: float
    parts: Mapping[str, float]

    @property
    def tokens_per_second(self) -> float:
        """The predicted speed."""
        return self.tokens / self.seconds

    @property
    def roofline_tokens_per_second(self) -> float:
        """The speed that the machine forbids to exceed."""
        return self.tokens / self.floor_seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """How fast a model will read and write, and the limits that this follows from."""

    speeds: Speeds
    workload: Workload
    prefill: Phase
    decode: Phase


def predict(
    config: JambaConfig,
    weights: str,
    workload: Workload,
    measured: Measure | None = None,
) -> Prediction:
    """Predict how fast a model of this shape runs a workload here, with torch's threads.

    Args:
        config: the shape.
        weights: format of `memory.WEIGHT_FORMATS`.
        workload: what it is to do.
        measured: how a sample is timed; `sample_seconds` when None.

    Raises:
        CapacityError: the model, or a few layers side by side, do not fit into memory.
        InputError: no such format.
    """
    needed, memory = weight_bytes(config, weights), usable_memory()
    if needed > memory:
        raise CapacityError(
            f"the weights take {needed:,} bytes in {weights}, this machine has {memory:,}: its "
            "speed here cannot be predicted; --weights int4 takes the fewest"
        )
    measured = measured or sample_seconds
    speeds = measure_speeds(min(weight_bytes(config, weights), LARGEST_SET))
    sample = Sampler(config, weights, sampled_workload(config, weights, workload, speeds), measured)
    layers, beside = sample.layer_seconds(), sample.seconds_beside_layers()
    return Prediction(
        speeds=speeds,
        workload=workload,
        prefill=_phase(config, weights, speeds, reading_calls(workload), layers, beside, "prefill"),
        decode=_phase(config, weights, speeds, writing_calls(workload), layers, beside, "decode"),
    )


def sampled_workload(
    config: JambaConfig, weights: str, workload: Workload, speeds: Speeds
) -> Workload:
    """Return what samples do: read one piece, and write as much as takes no time."""
    step = floor_seconds(model_work(config, writing_calls(workload)[0], weights), speeds)
    return Workload(
        min(workload.num_prompt_tokens, workload.piece),
        min(workload.num_new_tokens, max(FEWEST_NEW_TOKENS, int(WRITING_TIME / step))),
        workload.batch,
        workload.prefill_tokens,
    )


def reading_calls(workload: Workload) -> list[Call]:
    """List the calls that read the prompts."""
    calls = []
    for first in range(0, workload.num_prompt_tokens, workload.piece):
        tokens = min(workload.piece, workload.num_prompt_tokens - first)
        calls.append(Call(workload.batch, tokens, first))
    return calls


def writing_calls(workload: Workload) -> list[Call]:
    """List the calls that write the answers."""
    return [
        Call(workload.batch, 1, workload.num_prompt_tokens + written)
        for written in range(workload.num_new_tokens)
    ]


def _phase(
    config: JambaConfig,
    weights: str,
    speeds: Speeds,
    calls: list[Call],
    layers: Mapping[Kind, Seconds],
    beside: Seconds,
    name: str,
) -> Phase:
    """Scale what the sampled call took to every call of a phase, by their floors."""
    counts = Counter(kind_of(spec) for spec in plan_layers(config))
    specs = {kind_of(spec): spec for spec in plan_layers(config)}
    sampled = calls[0]
    seconds = floor = memory = 0.0
    parts: dict[str, float] = {}
    floor_of: dict[tuple[Call, Kind], float] = {}
    for call in calls:
        works = model_work(config, call, weights)
        floor += floor_seconds(works, speeds)
        memory += sum(work.floor(speeds) for work in works if work.reads_longer(speeds))
        for work in works:
            parts[work.part] = parts.get(work.part, 0.0) + work.floor(speeds)
        seconds += getattr(beside, name)
        for kind, count in counts.items():
            for asked in (sampled, call):
                if (asked, kind) not in floor_of:
                    works = layer_work(config, specs[kind], asked, weights)
                    floor_of[asked, kind] = floor_seconds(works, speeds)
            share = floor_of[call, kind] / floor_of[sampled, kind]
            seconds += count * getattr(layers[kind], name) * share
    tokens = sum(call.rows for call in calls)
    return Phase(tokens, floor, seconds, memory / floor, parts)
