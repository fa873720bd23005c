"""A training run as data: what a recipe may say, and in which range.

Imports no torch. Knows neither files nor how a run is carried out.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jamba_lm.config import JambaConfig
from jamba_lm.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is read. Paths are relative to the recipe file.

    Attributes:
        train: files of documents, .jsonl with a `text` a line or plain text.
        validation: files of held-out documents.
        tokenizer: folder with tokenizer.json; copied beside the exported model.
        prepared: in place of these three, a folder that `jamba data prepare` has written. With
            `validation`, those files are held out and not what the folder holds out.
        sequence_tokens: tokens of the longest piece of a document that is learned from.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tokenizer: str = ""
    prepared: str = ""
    sequence_tokens: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """How long, and in what.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_tokens: tokens of one forward and backward pass, at most.
        accumulate: passes whose gradients are summed for one step, in each of the processes that
            read other documents.
        workers: passes that run at the same time, each on a copy of the model and its share of the
            CPU threads. This changes the speed and nothing else; a small model is faster with
            workers of one thread each.
        dtype: what the model computes in; the master weights are float32 in any case.
        seed: of the initial weights and of the order of the data.
        recompute_layers: layers keep only their input and run again in the backward pass: a third
            more arithmetic, and a fraction of the memory.
        segment_tokens: rows of a pass that go forward and backward together; 0 takes all of them.
            Beyond the inputs of layers only one segment of one layer is in memory, so that a pass
            may be one document of a million tokens. Layers run again in the backward pass.
        across_segments: gradients reach over the cuts between segments ("whole": those of an
            ordinary pass), or end there ("truncated": states, keys and values cross as numbers).
    """

    steps: int
    batch_tokens: int = 8192
    accumulate: int = 1
    workers: int = 1
    dtype: str = "bf16"
    seed: int = 0
    recompute_layers: bool = False
    segment_tokens: int = 0
    across_segments: str = "whole"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSection:
    """What is added to the cross entropy. The balance loss has its coefficient in [model].

    Attributes:
        balance_over: what the use of experts is balanced over: each "pass", or the whole "step",
            which gives the gradient of one large pass and costs a second forward of every pass.
        activation_coef: of the mean square of what layers add to the residual stream; 0 leaves the
            loss out. Jamba-1.5 Large had 1e-5.
        z_coef: of the mean square of log sum exp of the logits; 0 leaves the loss out.
    """

    balance_over: str = "pass"
    activation_coef: float = 0.0
    z_coef: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSection:
    """What is looked at on the way.

    Attributes:
        every_steps: how often the largest activations of each layer, the load of each expert and
            the gradient norm of each layer are logged; 0 is never.
        spike: a loss far above its predecessors, or a gradient that is not finite, is "noted"
            (the latter ends the run), its step "skipped", or the run is "rolled back" to the last
            checkpoint and reads on.
        spike_threshold: usual deviations above the median of the last losses.
    """

    every_steps: int = 50
    tensorboard: bool = False
    spike: str = "noted"
    spike_threshold: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """AdamW's numbers; `clip_norm` bounds the norm of the whole gradient."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSection:
    """How the learning rate moves; see `optimizer.learning_rate_at`.

    Attributes:
        kind: "cosine" or "warmup-stable-decay".
        warmup_steps: steps until the peak.
        decay_steps: length of the final fall of "warmup-stable-decay"; unused by "cosine".
        final_fraction: part of the peak that is left at the end.
    """

    kind: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_fraction: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSection:
    """How often the held-out documents are read; they are always read after the last step."""

    every_steps: int = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """How often a run is saved: by steps, by the clock, or both. Neither changes the result.

    Attributes:
        every_steps: 0 means that steps do not matter.
        every_seconds: 0 means that the clock does not matter.
        keep: how many of the newest checkpoints stay.
    """

    every_steps: int = 0
    every_seconds: float = 300.0
    keep: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecipe(ABC):
    """What every kind of training run needs to know, whatever it starts from and reads."""

    training: TrainingSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    loss: LossSection = field(default_factory=LossSection)
    watch: WatchSection = field(default_factory=WatchSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    @abstractmethod
    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain sections, as a recipe file has them, with nothing left to a default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(RunRecipe):
    """Everything that a run from fresh weights needs to know."""

    model: JambaConfig
    data: DataSection

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain sections, as a recipe file has them, with nothing left to a default."""
        sections: dict[str, dict[str, Any]] = {"model": self.model.to_dict()}
        for name in SECTIONS:
            sections[name] = dataclasses.asdict(getattr(self, name))
        return sections


SECTIONS: Mapping[str, type[Any]] = {
    "data": DataSection,
    "training": TrainingSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "loss": LossSection,
    "watch": WatchSection,
    "validation": ValidationSection,
    "checkpoint": CheckpointSection,
    "parallel": ParallelLayout,
}

# The range of every number, ends included.
RANGES: Mapping[str, tuple[float, float]] = {
    "data.sequence_tokens": (2, 2**24),
    "training.steps": (1, 10**9),
    "training.batch_tokens": (2, 2**28),
    "training.accumulate": (1, 2**16),
    "training.workers": (1, 1024),
    "training.seed": (0, 2**62),
    "training.segment_tokens": (0, 2**28),
    "optimizer.learning_rate": (0.0, 100.0),
    "optimizer.beta1": (0.0, 0.999999),
    "optimizer.beta2": (0.0, 0.99999999),
    "optimizer.eps": (1e-30, 1.0),
    "optimizer.weight_decay": (0.0, 100.0),
    "optimizer.clip_norm": (1e-9, 1e9),
    "schedule.warmup_steps": (0, 10**9),
    "schedule.decay_steps": (0, 10**9),
    "schedule.final_fraction": (0.0, 1.0),
    "loss.activation_coef": (0.0, 1.0),
    "loss.z_coef": (0.0, 1.0),
    "watch.every_steps": (0, 10**9),
    "watch.spike_threshold": (1.0, 10**6),
    "validation.every_steps": (1, 10**9),
    "checkpoint.every_steps": (0, 10**9),
    "checkpoint.every_seconds": (0.0, 10**9),
    "checkpoint.keep": (1, 10**6),
    "parallel.replicate": (1, 10**6),
    "parallel.shard": (1, 10**6),
    "parallel.context": (1, 10**6),
    "parallel.tensor": (1, 10**6),
    "parallel.expert": (1, 10**6),
}
CHOICES: Mapping[str, tuple[str, ...]] = {
    "training.dtype": ("bf16", "fp32"),
    "training.across_segments": ("whole", "truncated"),
    "schedule.kind": ("cosine", "warmup-stable-decay"),
    "loss.balance_over": ("pass", "step"),
    "watch.spike": ("noted", "skipped", "rolled back"),
}
