"""A fine-tuning run as data: what its recipe may say, and in which range.

Imports no torch. Everything that is not of fine-tuning alone is as in `training/recipe.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jamba_lm.quantization.policy import SCHEMES
from jamba_lm.training.recipe import (
    CHOICES,
    RANGES,
    SECTIONS,
    OptimizerSection,
    RunRecipe,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSection:
    """What is tuned.

    Attributes:
        base: a checkpoint folder or a .gguf file, relative to the recipe file, or "demo".
        quantize: pack the weights while they are read, by one of `quantization.policy.SCHEMES`, and
            train an adapter over them; "" leaves them as they are.
    """

    base: str
    quantize: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningData:
    """What is read. Paths are relative to the recipe file.

    Attributes:
        train: .jsonl files with `messages`, with `prompt` and `completion`, or with `text` a line;
            any other file is one plain text.
        validation: likewise, held out.
        sequence_tokens: the longest record, in tokens; a longer plain text is cut.
        answers: of a conversation, "all" answers are learned, or the "last" one.
        bad_records: whether a record that cannot be used is "refused", which ends the run before it
            starts, or "dropped" and counted.
        duplicates: whether a record that was there before is "dropped" and counted, or "kept".
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    sequence_tokens: int = 512
    answers: str = "all"
    bad_records: str = "refused"
    duplicates: str = "dropped"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSection:
    """A low-rank adapter. A recipe without this section trains all weights.

    Attributes:
        rank: of every change.
        alpha: what a change is multiplied by, before it is divided by the rank.
        rslora: divide by the square root of the rank instead.
        dropout: share of an adapter's inputs that a pass leaves out.
        targets: which linear modules: "attention", "mamba", "mlp", "experts", "router",
            "embedding", "head", the name of a projection ("in_proj"), or both
            ("experts.down_proj"). When left out, those of `linears.USUAL`.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningOptimizer(OptimizerSection):
    """AdamW's numbers. The learning rate has no default: an adapter's is far above a full run's."""

    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRecipe(RunRecipe):
    """Everything that a fine-tuning run needs to know."""

    model: BaseSection
    data: TuningData
    adapter: AdapterSection | None = None
    optimizer: OptimizerSection = field(default_factory=TuningOptimizer)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain sections, as a recipe file has them, with nothing left to a default."""
        sections = {}
        for name in TUNING_SECTIONS:
            section = getattr(self, name)
            if section is not None:
                sections[name] = dataclasses.asdict(section)
        return sections


TUNING_SECTIONS: Mapping[str, type[Any]] = {
    "model": BaseSection,
    "data": TuningData,
    "adapter": AdapterSection,
    **{name: kind for name, kind in SECTIONS.items() if name != "data"},
    "optimizer": TuningOptimizer,
}
TUNING_RANGES: Mapping[str, tuple[float, float]] = {
    **RANGES,
    "adapter.rank": (1, 2**16),
    "adapter.alpha": (1e-6, 1e6),
    "adapter.dropout": (0.0, 0.95),
}
TUNING_CHOICES: Mapping[str, tuple[str, ...]] = {
    **CHOICES,
    "model.quantize": tuple(SCHEMES),
    "data.answers": ("all", "last"),
    "data.bad_records": ("refused", "dropped"),
    "data.duplicates": ("dropped", "kept"),
}
