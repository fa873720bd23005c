"""Which part of every tensor a rank of a mesh holds, and how many values that is.

Needs no torch. Experts are dealt out over `expert`, every tensor is split over `tensor`, and what a
rank then has to compute with is kept in shards, cut along the first axis as torch's FSDP2 does; but
for A_log and D, which every rank keeps whole (`training/sharding.py`).

Source: torch.distributed.fsdp.fully_shard (torch.chunk along dimension 0, the last ones empty).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from jamba_lm.analysis.tensors import Part, TensorGroup, list_tensors
from jamba_lm.analysis.training_cost.mesh import weight_shards
from jamba_lm.analysis.training_cost.rank import layer_kinds
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import LayerSpec
from jamba_lm.parallel_layout import ParallelLayout

# The axis along which `tensor` splits a tensor of this name; the others are on all of its ranks.
_SPLIT_AXES = {
    "embedding.weight": 0,
    "head.weight": 0,
    "mixer.in_proj.weight": 0,
    "mixer.in_proj.bias": 0,
    "mixer.conv_CW": 0,
    "mixer.conv_bias_C": 0,
    "mixer.x_proj.weight": 1,
    "mixer.dt_proj.weight": 0,
    "mixer.dt_bias_C": 0,
    "mixer.log_decay_CN": 0,
    "mixer.skip_C": 0,
    "mixer.out_proj.weight": 1,
    "mixer.q_proj.weight": 0,
    "mixer.k_proj.weight": 0,
    "mixer.v_proj.weight": 0,
    "mixer.o_proj.weight": 1,
    "feed_forward.gate_proj.weight": 0,
    "feed_forward.up_proj.weight": 0,
    "feed_forward.down_proj.weight": 1,
    "feed_forward.experts.gate_proj.weight": 0,
    "feed_forward.experts.up_proj.weight": 0,
    "feed_forward.experts.down_proj.weight": 1,
}

_KEYS_AND_VALUES = ("mixer.k_proj.weight", "mixer.v_proj.weight")


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of the tensors of one name.

    Attributes:
        part: of the model.
        name: of the tensors.
        copies: tensors of that name that the rank computes with.
        gathered: values of one of them when it is computed with.
        held: values of one of them that stay with the rank: the largest shard.
        wide: float32 whatever the model's type.
    """

    part: Part
    name: str
    copies: int
    gathered: int
    held: int
    wide: bool


@functools.lru_cache(maxsize=1024)
def rank_shares(config: JambaConfig, mesh: ParallelLayout) -> tuple[Share, ...]:
    """List what the rank with the most holds of every tensor.

    >>> sum(one.copies * one.held for one in rank_shares(JambaConfig(), ParallelLayout()))
    51570323328
    """
    return tuple(_share(group, config, mesh) for group in _tensors(config))


@functools.lru_cache(maxsize=64)
def _tensors(config: JambaConfig) -> tuple[TensorGroup, ...]:
    return list_tensors(config)


def _share(group: TensorGroup, config: JambaConfig, mesh: ParallelLayout) -> Share:
    shape, copies, shards = list(group.shape), group.copies, weight_shards(mesh)
    if group.part == "experts":
        copies, shards = copies // mesh.expert, mesh.expert_shard
    axis = _SPLIT_AXES.get(group.name)
    if group.name in _KEYS_AND_VALUES and config.num_kv_heads % mesh.tensor:
        # Each rank uses one head of them, and has all.
        axis = None
    if axis is not None:
        shape[axis] //= mesh.tensor
    if group.wide:
        shards = 1
    held = chunks(shape[0], shards)[0] * math.prod(shape[1:])
    return Share(group.part, group.name, copies, math.prod(shape), held, group.wide)


def chunks(length: int, parts: int) -> list[int]:
    """Return the sizes that torch.chunk cuts an axis into, empty ones for the ranks left over.

    >>> chunks(10, 4), chunks(2, 4)
    ([3, 3, 3, 1], [1, 1, 0, 0])
    """
    size = -(-length // parts)
    return [max(0, min(size, length - first * size)) for first in range(parts)]


@functools.lru_cache(maxsize=1024)
def layer_values(config: JambaConfig, mesh: ParallelLayout) -> tuple[int, ...]:
    """Return the values that a rank gathers to run a layer of each kind."""
    return tuple(_layer_values(config, spec, mesh) for spec, _ in layer_kinds(config))


def _layer_values(config: JambaConfig, spec: LayerSpec, mesh: ParallelLayout) -> int:
    never, always = {"period": 2, "offset": 1}, {"period": 1, "offset": 0}
    attention = always if spec.mixer == "attention" else never
    experts = always if spec.feed_forward == "moe" else never
    one = config.replace(
        num_layers=1,
        attention_period=attention["period"],
        attention_offset=attention["offset"],
        expert_period=experts["period"],
        expert_offset=experts["offset"],
    )
    beside = ("embedding.weight", "head.weight", "final_norm.weight")
    shares = [share for share in rank_shares(one, mesh) if share.name not in beside]
    return sum(share.copies * share.gathered for share in shares if not share.wide)
