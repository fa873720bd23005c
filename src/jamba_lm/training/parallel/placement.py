"""Which part of a whole model's parameter lies in which parameter of a parallel one.

Whole parameters have the names of `Decoder`. A parallel decoder has the same, but for `in_proj`,
which is two, and for experts that other processes hold. Its names do not depend on how many
processes there are, so that a checkpoint of one mesh fits another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from jamba_lm.config import JambaConfig
from jamba_lm.parallel_layout import ParallelLayout

# The axis that the tensor processes share, by the end of a parameter's name: outputs of what comes
# first, inputs of what comes last, and channels. What is not here is whole on each of them.
SPLIT_AXES: Mapping[str, int] = {
    "embedding.weight": 0,
    "head.weight": 0,
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "o_proj.weight": 1,
    "gate_proj.weight": 0,
    "up_proj.weight": 0,
    "down_proj.weight": 1,
    "u.weight": 0,
    "u.bias": 0,
    "gate.weight": 0,
    "gate.bias": 0,
    "mixer.conv_CW": 0,
    "mixer.conv_bias_C": 0,
    "x_proj.weight": 1,
    "dt_proj.weight": 0,
    "mixer.dt_bias_C": 0,
    "mixer.log_decay_CN": 0,
    "mixer.skip_C": 0,
    "out_proj.weight": 1,
}
HALVES = ("u", "gate")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a parameter of the parallel decoder comes from.

    Attributes:
        whole: the whole parameter's name.
        half: of its rows, counted from 0; None when all of them.
        axis: cut over the tensor processes; None when each has all of it.
        expert: whether only some processes have it at all.
    """

    whole: str
    half: int | None
    axis: int | None
    expert: bool

    def part(self, whole: Tensor) -> Tensor:
        """Return what the parameter is of `whole`, before the tensor processes share it."""
        return whole if self.half is None else whole.chunk(2)[self.half]


def placement_of(name: str, config: JambaConfig, layout: ParallelLayout) -> Placement:
    """Return where the parameter `name` of a parallel decoder comes from."""
    parts = name.split(".")
    whole, half = name, None
    if parts[-3:-2] == ["in_proj"]:
        whole, half = ".".join([*parts[:-2], parts[-1]]), HALVES.index(parts[-2])
    axis = SPLIT_AXES.get(".".join(parts[-2:])) if layout.tensor > 1 else None
    if parts[-2] in ("k_proj", "v_proj") and config.num_kv_heads % layout.tensor:
        axis = None
    return Placement(whole, half, axis, "experts" in parts)
