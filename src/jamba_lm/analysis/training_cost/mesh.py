"""Layouts of processes as a plan sees them: read from text, and who exchanges with whom.

Needs no torch. Knows shapes, and neither speeds nor how a step is carried out.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import InputError, RecipeError
from jamba_lm.parallel_layout import ParallelLayout

LARGEST_AXIS = 2**20
AXES = tuple(one.name for one in dataclasses.fields(ParallelLayout) if one.name != "sequence")
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def describe(mesh: ParallelLayout) -> str:
    """Write a layout as `--mesh` takes it, axes of one rank left out.

    >>> describe(ParallelLayout(shard=8, tensor=8, sequence=True))
    'shard=8,tensor=8,sequence=true'
    >>> describe(ParallelLayout())
    'shard=1'
    """
    parts = [f"{name}={getattr(mesh, name)}" for name in AXES if getattr(mesh, name) != 1]
    if mesh.sequence:
        parts.append("sequence=true")
    return ",".join(parts) or "shard=1"


def parse_mesh(text: str) -> ParallelLayout:
    """Read a layout such as `shard=8,tensor=8,expert=16,sequence=true`.

    >>> parse_mesh("replicate=2, shard=4").world_size
    8

    Raises:
        InputError: an axis is not known or given twice, or its number is none.
    """
    found: dict[str, int | bool] = {}
    for part in text.split(","):
        name, equals, value = (one.strip() for one in part.partition("="))
        known = (*AXES, "sequence")
        if not equals or name not in known:
            raise InputError(
                f"--mesh has {shown(part.strip())}: expected AXIS=NUMBER, the axes being "
                f"{', '.join(known)}{closest(name, known)}"
            )
        if name in found:
            raise InputError(f"--mesh gives {name} twice: expected each axis once")
        if name == "sequence":
            if value.lower() not in _FLAGS:
                raise InputError(f"--mesh has sequence={shown(value)}: expected true or false")
            found[name] = _FLAGS[value.lower()]
            continue
        if not re.fullmatch(r"[0-9]{1,7}", value) or not 1 <= int(value) <= LARGEST_AXIS:
            raise InputError(
                f"--mesh has {name}={shown(value)}: expected a number from 1 to {LARGEST_AXIS:,}"
            )
        found[name] = int(value)
    return ParallelLayout(**found)  # type: ignore[arg-type]  # `sequence` is the only flag


def check_mesh(mesh: ParallelLayout, config: JambaConfig, sequence_tokens: int) -> None:
    """Refuse a layout that training would refuse, or that cuts sequences unevenly.

    Raises:
        InputError: the message says what was to be divided.
    """
    try:
        mesh.validate(config, mesh.world_size)
    except RecipeError as error:
        raise InputError(str(error)) from error
    parts = mesh.context * row_share(mesh)
    if sequence_tokens % parts:
        raise InputError(
            f"context={mesh.context} and tensor={mesh.tensor} do not divide a sequence of "
            f"{sequence_tokens:,} tokens: its rows are shared out among them, so take a sequence "
            f"of {-(-sequence_tokens // parts) * parts:,}"
        )


def row_share(mesh: ParallelLayout) -> int:
    """Return among how many ranks of `tensor` the rows of the residual stream are shared out."""
    return mesh.tensor if mesh.sequence else 1


def weight_shards(mesh: ParallelLayout) -> int:
    """Return how many ranks share out the weights that are no experts'."""
    return mesh.shard * mesh.context


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that exchange something: `size` of them, `stride` apart.

    Attributes:
        size: ranks.
        stride: from one to the next.
    """

    size: int
    stride: int

    def in_a_node(self, node: int) -> int:
        """Return how many of them sit in one node of `node` devices."""
        return max(1, min(self.size, node // self.stride))


def group_of(mesh: ParallelLayout, axis: str) -> Group:
    """Return the ranks along an axis; "weights" and "expert weights" are those of FSDP."""
    shards = weight_shards(mesh)
    groups = {
        "tensor": Group(mesh.tensor, 1),
        "context": Group(mesh.context, mesh.tensor),
        "expert": Group(mesh.expert, mesh.tensor),
        "weights": Group(shards, mesh.tensor),
        "expert weights": Group(mesh.expert_shard, mesh.tensor * mesh.expert),
        "replicate": Group(mesh.replicate, mesh.tensor * shards),
        # Whoever works on other rows.
        "rows": Group(mesh.replicate * shards, mesh.tensor),
    }
    return groups[axis]
