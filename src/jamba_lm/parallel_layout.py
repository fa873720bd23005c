"""How many processes share what: the axes of a run on many processes, and what they refuse.

Needs no torch, so that recipes and plans are checked at once, by the same rules. Knows neither
weights nor rows.

Ranks are numbered with `tensor` innermost, then `context`, `shard`, `replicate`:

    rank = ((replicate * S + shard) * C + context) * T + tensor
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jamba_lm.config import JambaConfig
from jamba_lm.errors import RecipeError
from jamba_lm.model.layout import plan_layers

AXES = ("replicate", "shard", "context", "tensor")
EXPERT_AXES = ("replicate", "expert_shard", "expert", "tensor")


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the axes that a run is spread over; their product is the number of processes.

    Attributes:
        replicate: copies of the whole arrangement, each with other documents, whose gradients are
            added up (HSDP's outer axis; without `shard`, plain data parallelism).
        shard: processes with other documents each, over which weights are cut up (FSDP).
        context: processes that share the rows of a batch, in contiguous pieces.
        tensor: processes that share every matrix, head and channel.
        expert: processes that share the experts of a mixture. They are not more processes: each
            group is `expert` neighbours among the `shard` x `context` ones of a replica.
        sequence: the `tensor` processes also share the rows between the matrices.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def num_readers(self) -> int:
        """Different batches that are read at a time: what data is cut into."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Processes of a replica that hold the same experts, and so can share their weights out."""
        return self.shard * self.context // self.expert

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the place of a process along each of the four axes, by name.

        >>> ParallelLayout(shard=2, context=2, tensor=2).coordinates(5)
        {'replicate': 0, 'shard': 1, 'context': 0, 'tensor': 1}
        """
        places = {}
        for axis in reversed(AXES):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return {axis: places[axis] for axis in AXES}

    def reader(self, rank: int) -> int:
        """Return which of the `num_readers` batches a process works on."""
        places = self.coordinates(rank)
        return places["replicate"] * self.shard + places["shard"]

    def validate(self, config: JambaConfig, world_size: int) -> None:
        """Check that a model of this shape can be spread over so many processes.

        Raises:
            RecipeError: a size is not a number of processes, the product is another one, two
                axes exclude each other, or something of the model does not divide.
        """
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name == "sequence":
                if not isinstance(size, bool):
                    raise RecipeError(f"parallel.sequence={size!r}, expected true or false")
            elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise RecipeError(
                    f"parallel.{field.name}={size!r}, expected a number of processes, at least 1"
                )
        if self.world_size != world_size:
            sizes = " x ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)
            raise RecipeError(
                f"the recipe asks for {sizes} = {self.world_size} processes and {world_size} "
                "were started: change one of the two"
            )
        if self.sequence and self.tensor == 1:
            raise RecipeError(
                "parallel.sequence shares rows among the tensor processes, of which there is one: "
                "set parallel.tensor to 2 or more, or sequence to false"
            )
        self._check_experts(config)
        if self.tensor > 1:
            self._check_widths(config)

    def _check_experts(self, config: JambaConfig) -> None:
        if self.expert == 1:
            return
        if all(layer.feed_forward != "moe" for layer in plan_layers(config)):
            raise RecipeError(
                f"parallel.expert={self.expert} for a model without experts: set it to 1"
            )
        if (self.shard * self.context) % self.expert:
            raise RecipeError(
                f"parallel.expert={self.expert} does not divide shard={self.shard} x "
                f"context={self.context}: experts are spread over processes that hold other rows"
            )
        if config.num_experts % self.expert:
            raise RecipeError(
                f"parallel.expert={self.expert} does not divide num_experts={config.num_experts}"
            )

    def _check_widths(self, config: JambaConfig) -> None:
        mixers = {layer.mixer for layer in plan_layers(config)}
        widths = {"vocab_size": config.vocab_size, "d_ff": config.d_ff}
        if "attention" in mixers:
            widths["num_heads"] = config.num_heads
        if "mamba" in mixers:
            widths["d_inner"] = config.d_inner
        for name, width in widths.items():
            if width % self.tensor:
                raise RecipeError(f"parallel.tensor={self.tensor} does not divide {name}={width}")
        groups = config.num_kv_heads
        if "attention" in mixers and groups % self.tensor and self.tensor % groups:
            raise RecipeError(
                f"parallel.tensor={self.tensor} neither divides num_kv_heads={groups} nor is a "
                "multiple of it: every process needs whole key/value heads, or one of them"
            )
