"""A finished decoder made into one process's share of it, and what training needs to know of that.

`model/` stays unaware: modules are exchanged for ones that hold the same parameters. Wrapping the
result with FSDP2, if anyone does, is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from jamba_lm.data import PackedBatch
from jamba_lm.errors import RecipeError
from jamba_lm.model.attention import AttentionMixer
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.moe import MoE
from jamba_lm.model.norm import RMSNorm
from jamba_lm.model.routing import Routing
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.balance import Selections
from jamba_lm.training.loss import SummedLosses
from jamba_lm.training.output import output_weight
from jamba_lm.training.parallel.collectives import Group, add_up, cut_evenly
from jamba_lm.training.parallel.feed_forward import Experts, ParallelMLP, ParallelMoE
from jamba_lm.training.parallel.meshes import expert_process_mesh
from jamba_lm.training.parallel.mixers import ParallelAttention, ParallelMamba
from jamba_lm.training.parallel.norm import ParallelNorm
from jamba_lm.training.parallel.placement import Placement, placement_of
from jamba_lm.training.parallel.region import Region
from jamba_lm.training.parallel.row_cut import ContextBatch, RowCut
from jamba_lm.training.parallel.vocabulary import ParallelEmbedding, losses_in_parts

DATA_AXES = ("replicate", "shard", "context")
EXPERT_DATA_AXES = ("replicate", "expert_shard")


@dataclass(frozen=True, slots=True)
class Whole:
    """What a parameter of the whole model is like."""

    shape: torch.Size
    dtype: torch.dtype


class Decisions(Sequence[Routing]):
    """What the routers of a forward pass decided.

    Not a list: FSDP2 makes lists among the arguments of a module anew, and what is appended to the
    copy would be lost.
    """

    def __init__(self) -> None:
        self._taken: list[Routing] = []

    def append(self, decision: Routing) -> None:
        """Take the decision of the next mixture."""
        self._taken.append(decision)

    def __len__(self) -> int:
        return len(self._taken)

    def __getitem__(self, index: Any) -> Any:
        return self._taken[index]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The rows of a batch that one process works on.

    Attributes:
        ids_M: token ids.
        targets_M: what each row is to predict.
        batch: which of them belong together, and to what other processes hold.
        routing: filled by the forward pass, when the model has experts.
    """

    ids_M: Tensor
    targets_M: Tensor
    batch: Batch
    routing: Decisions


def parallelize(decoder: Decoder, layout: ParallelLayout, mesh: DeviceMesh) -> Parallelized:
    """Make `decoder` this process's share of itself, in place. All processes call it together.

    A decoder on the meta device stays there, with parameters of the size that is held here: give
    it memory, and values by `Parallelized.load`. Of a finished one, this process's part is copied
    and the rest let go.

    Args:
        decoder: whole.
        layout: how many processes share what.
        mesh: what `process_mesh` returned.

    Raises:
        RecipeError: see `ParallelLayout.validate`.
    """
    layout.validate(decoder.config, mesh.size())
    experts = expert_process_mesh(layout, mesh.device_type) if layout.expert > 1 else None
    values = dict(decoder.named_parameters())
    parallel = Parallelized(decoder, layout, mesh, experts)
    parallel._exchange_modules()
    parallel._take_parts(values)
    return parallel


class Parallelized:
    """A decoder of which this process holds a share.

    Gradients that `backward` leaves are right but for one sum: they are those of this process's
    own rows, to be added up (not averaged) over the processes that hold other rows and the same
    parameter. `sum_gradients` does it, or FSDP2 with a divide factor of one.

    Attributes:
        decoder: the share; call it with what `share_of` returns.
        layout: as given.
        mesh: as given, of the axes "replicate", "shard", "context", "tensor".
        expert_mesh: the same processes along "replicate", "expert_shard", "expert", "tensor"; None
            when every process has all experts.
        wholes: every parameter of the whole model by name, in the order of `Decoder`.
        placements: for each parameter held here, by its name here, where it comes from.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: ParallelLayout,
        mesh: DeviceMesh,
        expert_mesh: DeviceMesh | None,
    ) -> None:
        self.decoder, self.layout = decoder, layout
        self.mesh, self.expert_mesh = mesh, expert_mesh
        self.wholes = {
            name: Whole(one.shape, one.dtype) for name, one in decoder.named_parameters()
        }
        self.placements: dict[str, Placement] = {}
        self._region = Region(Group.along(mesh, "tensor"), layout.sequence)
        self._context = Group.along(mesh, "context")
        self._data = [Group.along(mesh, axis) for axis in DATA_AXES]
        self._expert, self._expert_data = Group(None, 0, 1), self._data
        if expert_mesh is not None:
            self._expert = Group.along(expert_mesh, "expert")
            self._expert_data = [Group.along(expert_mesh, axis) for axis in EXPERT_DATA_AXES]

    def _exchange_modules(self) -> None:
        decoder, region = self.decoder, self._region
        decoder.embedding = ParallelEmbedding(decoder.embedding, region)
        decoder.final_norm = ParallelNorm(decoder.final_norm, region)
        for one in decoder.blocks:
            block = cast(Any, one)
            block.mixer_norm = ParallelNorm(block.mixer_norm, region)
            block.feed_forward_norm = ParallelNorm(block.feed_forward_norm, region)
            block.mixer = self._parallel_mixer(block.mixer)
            if isinstance(block.feed_forward, MoE):
                block.feed_forward = ParallelMoE(block.feed_forward, region, self._expert)
            else:
                block.feed_forward = ParallelMLP(block.feed_forward, region)

    def _parallel_mixer(self, mixer: nn.Module) -> nn.Module:
        if isinstance(mixer, AttentionMixer):
            groups = self.decoder.config.num_kv_heads
            return ParallelAttention(mixer, self._region, self._context, groups)
        assert isinstance(mixer, MambaMixer)
        parallel = ParallelMamba(mixer, self._region, self._context)
        for name, norm in list(parallel.named_children()):
            if isinstance(norm, RMSNorm):
                setattr(parallel, name, ParallelNorm(norm, None))
        return parallel

    def _take_parts(self, values: dict[str, nn.Parameter]) -> None:
        """Make every parameter the part of the whole one that belongs here."""
        for name, _ in list(self.decoder.named_parameters()):
            placement = placement_of(name, self.decoder.config, self.layout)
            whole = values[placement.whole]
            part = placement.part(whole.detach())
            if placement.axis is not None:
                parts = part.chunk(self.layout.tensor, placement.axis)
                part = parts[self._region.group.rank]
            held: Tensor = part.clone(memory_format=torch.contiguous_format)
            if self.layout.tensor > 1:
                mesh = self.mesh
                if placement.expert and self.expert_mesh is not None:
                    mesh = self.expert_mesh
                how = Replicate() if placement.axis is None else Shard(placement.axis)
                held = DTensor.from_local(held, mesh["tensor"], [how], run_check=False)
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(held, requires_grad=whole.requires_grad)
            setattr(self.decoder.get_submodule(owner), leaf, parameter)
            self.placements[name] = placement

    @property
    def num_readers(self) -> int:
        """Different batches that the processes work on at a time."""
        return self.layout.num_readers

    def experts(self) -> list[Experts]:
        """List the modules whose parameters are shared over `expert_mesh` instead of `mesh`."""
        return [one for one in self.decoder.modules() if isinstance(one, Experts)]

    def copies(self, name: str) -> int:
        """Count the processes that hold the same values of a parameter, where nothing cuts it.

        FSDP cuts it further, by "shard" x "context" or, an expert's, by "expert_shard". A norm
        over all parameters is the sum over processes of squares divided by what is left of this.
        """
        placement = self.placements[name]
        groups = self._expert_data if placement.expert else self._data
        count = self.layout.tensor if placement.axis is None else 1
        for group in groups:
            count *= group.size
        return count

    @torch.no_grad()
    def load(self, value_of: Callable[[str], Tensor]) -> None:
        """Give every parameter held here its part of the whole one. May be called after FSDP.

        Args:
            value_of: returns the whole parameter of that name, on any device, in any dtype.

        Raises:
            RecipeError: a value has another shape than the model's.
        """
        for name, parameter in self.decoder.named_parameters():
            placement = self.placements[name]
            whole = value_of(placement.whole)
            shape = self.wholes[placement.whole].shape
            if whole.shape != shape:
                raise RecipeError(
                    f"the value of {placement.whole!r} has shape {tuple(whole.shape)}, the model "
                    f"of the recipe wants {tuple(shape)}: give it the weights of that model"
                )
            part = placement.part(whole)
            if isinstance(parameter, DTensor):
                # No process sends anything: each takes its own part of the value that it has.
                spread = distribute_tensor(
                    part.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,
                )
                parameter.to_local().copy_(spread.to_local())
            else:
                parameter.copy_(part)

    @torch.no_grad()
    def whole_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the whole model with its name, in the order of `Decoder`.

        All processes go through it together and get the same. One parameter is whole at a time.
        """
        held: dict[str, list[str]] = {}
        for name, placement in self.placements.items():
            held.setdefault(placement.whole, []).append(name)
        parameters = dict(self.decoder.named_parameters())
        share = self.decoder.config.num_experts // self._expert.size
        for name, whole in self.wholes.items():
            value = None
            if name in held:
                value = torch.cat([_full(parameters[part]) for part in held[name]])
            if self._expert.size > 1 and ".experts." in name:
                number = int(name.partition(".experts.")[2].partition(".")[0])
                value = self._from_holder(value, whole, number // share)
            assert value is not None
            assert value.shape == whole.shape
            yield name, value

    def _from_holder(self, value: Tensor | None, whole: Whole, holder: int) -> Tensor:
        if value is None:
            device = next(self.decoder.parameters()).device
            value = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        processes = self._expert.processes
        assert processes is not None
        dist.broadcast(value, dist.get_global_rank(processes, holder), processes)
        return value

    def share_of(
        self,
        packed: PackedBatch,
        *,
        backend: str | None = None,
    ) -> Share:
        """Return this process's rows of a batch.

        Args:
            packed: the same on all processes along "context" and "tensor"; others along "shard"
                and "replicate".
            backend: kernel back-end by name, or None.

        Raises:
            DataError: there are fewer rows than context processes.
        """
        routing = Decisions()
        if self._context.size == 1:
            batch = Batch.of(packed.lengths, backend=backend, routing=routing)
            return Share(packed.ids_M, packed.targets_M, batch, routing)
        cut = RowCut.of(packed.lengths, self._context.size, self._context.rank)
        held = slice(cut.first, cut.end)
        batch = ContextBatch.piece(cut, backend, routing)
        return Share(packed.ids_M[held], packed.targets_M[held], batch, routing)

    def rows_between_layers(self, share: Share) -> int:
        """Count the rows that layers get and give here: under `sequence`, a part of the share.

        What is computed from layers' outputs, like the activation loss, counts by these.
        """
        rows, group = share.batch.num_rows, self._region.group
        if not self.layout.sequence:
            return rows
        bounds = cut_evenly(rows, group.size)
        return bounds[group.rank + 1] - bounds[group.rank]

    def losses(self, hidden: Tensor, targets_M: Tensor, z_coef: float = 0.0) -> SummedLosses:
        """Return the losses of this process's rows, alike on all processes along "tensor".

        Args:
            hidden: what the decoder returned with `hidden=True`.
            targets_M: what `share_of` returned.
            z_coef: see `summed_losses`.
        """
        weight = output_weight(self.decoder)
        return losses_in_parts(hidden, weight, targets_M, self._region, z_coef)

    def sum_over_rows(self, x: Tensor) -> Tensor:
        """Add `x` up in place over all processes that hold other rows: losses, counts."""
        for group in self._data:
            add_up(x, group)
        return x

    def sum_selections(self, selections: Selections) -> Selections:
        """Return how often experts are taken by the rows of all processes together.

        `share_of_balance_loss` with the result makes this process's share of the balance loss of
        all rows.
        """
        counts = torch.cat(
            [selections.selections_X.double(), torch.tensor([float(selections.num_rows)])]
        )
        counts = self.sum_over_rows(counts)
        return Selections(counts[:-1].float(), int(counts[-1]))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add every gradient up over the processes that hold other rows. Not with FSDP."""
        for name, parameter in self.decoder.named_parameters():
            groups = self._expert_data if self.placements[name].expert else self._data
            assert parameter.grad is not None, f"{name} has no gradient"
            gradient = parameter.grad
            held = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            for group in groups:
                add_up(held, group)


def _full(parameter: Tensor) -> Tensor:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach()
