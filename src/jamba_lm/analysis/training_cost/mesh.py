"""How many ranks share a model and its tokens, along which axes, and what cannot be divided so.

Needs no torch. Knows shapes, and neither speeds nor how a step is carried out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import InputError

LARGEST_AXIS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The number of ranks along each axis, named as in a recipe's [parallel].

    Ranks are numbered with `tensor` running fastest, then `context`, `shard` and `replicate`, so
    that neighbours share what is exchanged most.

    Attributes:
        replicate: copies of everything, whose gradients are summed.
        shard: ranks that read different tokens and share out weights, gradients and optimizer
            (FSDP); those of `context` share them out as well.
        context: ranks that each read a piece of every sequence.
        tensor: ranks that split heads, channels, inner widths and the vocabulary.
        expert: ranks among which the experts of a layer are dealt out whole. They are neighbours
            among the ranks of shard, context and tensor, and no more ranks are needed for them. 1
            splits experts as MLPs are, over `tensor`.
        sequence: between the products that `tensor` splits, each of its ranks keeps a share of the
            rows.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def readers(self) -> int:
        """Ranks that read sequences of their own, each group of context and tensor counted once."""
        return self.replicate * self.shard

    @property
    def row_share(self) -> int:
        """Among how many ranks of `tensor` the rows of the residual stream are shared out."""
        return self.tensor if self.sequence else 1

    @property
    def weight_shards(self) -> int:
        """Ranks that share out the weights that are no experts'."""
        return self.shard * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share out the weights of an expert."""
        if self.expert == 1:
            return self.weight_shards
        return self.shard * self.context * self.tensor // self.expert

    def describe(self) -> str:
        """Write the mesh as `--mesh` takes it, axes of one rank left out.

        >>> Mesh(shard=8, tensor=8, sequence=True).describe()
        'shard=8,tensor=8,sequence=true'
        >>> Mesh().describe()
        'shard=1'
        """
        parts = [f"{name}={getattr(self, name)}" for name in AXES if getattr(self, name) != 1]
        if self.sequence:
            parts.append("sequence=true")
        return ",".join(parts) or "shard=1"


AXES = tuple(one.name for one in fields(Mesh) if one.name != "sequence")
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def parse_mesh(text: str) -> Mesh:
    """Read a mesh such as `shard=8,tensor=8,expert=16,sequence=true`.

    >>> parse_mesh("replicate=2, shard=4").gpus
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
    return Mesh(**found)  # type: ignore[arg-type]  # `sequence` is the only flag


def check_mesh(mesh: Mesh, config: JambaConfig, sequence_tokens: int) -> None:
    """Refuse a mesh that does not divide what it splits.

    Raises:
        InputError: the message says what was to be divided, and what would do.
    """
    split = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "d_inner": config.d_inner,
        "d_ff": config.d_ff,
        "vocab_size": config.vocab_size,
    }
    for name, size in split.items():
        if size % mesh.tensor:
            raise InputError(
                f"tensor={mesh.tensor} does not divide {name}={size:,}: "
                f"{_that_divide(mesh.tensor, tuple(split.values()))} would"
            )
    if mesh.expert > 1 and config.num_experts % mesh.expert:
        raise InputError(
            f"expert={mesh.expert} does not divide num_experts={config.num_experts}: "
            f"{_that_divide(mesh.expert, (config.num_experts,))} would"
        )
    lent = mesh.shard * mesh.context * mesh.tensor
    if lent % mesh.expert:
        raise InputError(
            f"expert={mesh.expert} does not divide shard x context x tensor = {lent:,}, whose "
            f"ranks the experts are dealt out to: {_that_divide(mesh.expert, (lent,))} would"
        )
    if sequence_tokens % (mesh.context * mesh.row_share):
        raise InputError(
            f"context={mesh.context} and tensor={mesh.tensor} do not divide a sequence of "
            f"{sequence_tokens:,} tokens: its rows are shared out among them, so take a sequence "
            f"of {-(-sequence_tokens // (k := mesh.context * mesh.row_share)) * k:,}"
        )
    if mesh.sequence and mesh.tensor == 1:
        raise InputError(
            "sequence=true shares rows among the ranks of tensor, and tensor is 1: leave it out, "
            "or give tensor=2 or more"
        )


def _that_divide(given: int, sizes: tuple[int, ...]) -> str:
    """Name the largest number not above `given` that divides all sizes."""
    return str(next(n for n in range(given, 0, -1) if not any(size % n for size in sizes)))


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


def group_of(mesh: Mesh, axis: str) -> Group:
    """Return the ranks along an axis; "weights" and "expert weights" are those of FSDP."""
    inner = mesh.tensor * mesh.context
    experts_apart = mesh.expert if mesh.expert > 1 else mesh.tensor
    groups = {
        "tensor": Group(mesh.tensor, 1),
        "context": Group(mesh.context, mesh.tensor),
        "expert": Group(mesh.expert, 1),
        "weights": Group(mesh.weight_shards, mesh.tensor),
        "expert weights": Group(mesh.expert_shards, experts_apart),
        "replicate": Group(mesh.replicate, inner * mesh.shard),
    }
    return groups[axis]
