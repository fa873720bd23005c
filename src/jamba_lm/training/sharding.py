"""A decoder spread over processes: FSDP2 on a finished model, and which part of what lies here.

Knows modules and meshes, and nothing of optimizers, data and files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jamba_lm.errors import ProcessError
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initial_value
from jamba_lm.model.moe import MoE
from jamba_lm.model.parameters import KEPT_WIDE
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.parallel.decoder import Parallelized, parallelize
from jamba_lm.training.parallel.meshes import process_mesh
from jamba_lm.training.places import Place


@dataclass(frozen=True, slots=True)
class ShardedParameter:
    """A parameter as it lies in one process.

    Attributes:
        name: in the decoder as it is here.
        whole: name of what it is a part of, in the decoder of one process.
        parameter: what the decoder holds between passes: float32, and the master weights.
        place: which part of the whole is here.
        copies: how many processes hold this very part.
        owned: whether this is the first of them, which saves it.
        summed: whether FSDP adds up its gradients; otherwise they are this process' own.
    """

    name: str
    whole: str
    parameter: nn.Parameter
    place: Place
    copies: int
    owned: bool
    summed: bool

    def local(self) -> Tensor:
        """Return the values that are here; writing to them changes the model."""
        return _here(self.parameter.detach())

    def gradient(self) -> Tensor | None:
        """Return the gradient of these values, None when there is none."""
        return None if self.parameter.grad is None else _here(self.parameter.grad)


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedDecoder:
    """A decoder whose parameters are float32 shards, and are rounded and put together to compute.

    Every layer is gathered when it is needed and given up behind it. A_log and D are computed with
    in float32, so they are not rounded with the others: every process keeps its channels of them
    whole, a few thousandths of the model.

    Attributes:
        decoder: computes as before, as long as all processes call it equally often.
        parallel: how rows, matrices and experts are shared out; None when nothing but documents
            and weights is.
        parameters: of this process.
        shapes: of all parameters of the whole model, by name and in the decoder's order.
    """

    def __init__(
        self, decoder: Decoder, layout: ParallelLayout, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Shard a decoder that is on the meta device; `fill` then gives it values.

        Args:
            decoder: rewritten in place.
            layout: that fits the number of processes.
            device: of this process.
            dtype: what is computed in.

        Raises:
            ProcessError: this torch is too old.
        """
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise ProcessError(
                f"training in several processes needs torch 2.9 or newer, this is "
                f"{torch.__version__}: install a newer one, or train in one process"
            )
        shared_rows = max(layout.context, layout.tensor, layout.expert) > 1
        if shared_rows and not hasattr(dist, "all_gather_single"):
            raise ProcessError(
                f"parallel.context, tensor and expert need torch 2.13 or newer, this is "
                f"{torch.__version__}: install a newer one, or leave them out"
            )
        self.decoder = decoder
        self.shapes = {name: tuple(one.shape) for name, one in decoder.named_parameters()}
        self._layout, self._mesh = layout, process_mesh(layout, device.type)
        self._here = layout.coordinates(self._mesh.get_rank())
        self.parallel: Parallelized | None = None
        if shared_rows:
            self.parallel = parallelize(decoder, layout, self._mesh)
        else:
            touch_idle_experts(decoder)
        self._shard_modules(dtype)
        decoder.to_empty(device=device)
        self.parameters = [self._describe(*one) for one in decoder.named_parameters()]

    def _shard_modules(self, dtype: torch.dtype) -> None:
        """Apply FSDP2, to experts that other processes share than share the rest first."""
        kept = {
            parameter
            for name, parameter in self.decoder.named_parameters()
            if name.rpartition(".")[2] in KEPT_WIDE
        }
        layout, parallel = self._layout, self.parallel
        if parallel is not None and parallel.expert_mesh is not None:
            axes = _with_copies("expert_shard", layout)
            shard = _sharder(parallel.expert_mesh[axes], dtype, kept)
            for experts in parallel.experts():
                shard(experts, True)
        rows = "shard"
        if layout.context > 1:
            rows = "rows"
            self._mesh["shard", "context"]._flatten(rows)
        shard = _sharder(self._mesh[_with_copies(rows, layout)], dtype, kept)
        for block in self.decoder.blocks:
            shard(block, True)
        # The loss reads the output weights behind the model's own forward pass.
        shard(self.decoder, False)
        self._sharded = [one for one in self.decoder.modules() if isinstance(one, FSDPModule)]
        for module in self._sharded:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _describe(self, name: str, parameter: nn.Parameter) -> ShardedParameter:
        layout, here, parallel = self._layout, self._here, self.parallel
        placement = None if parallel is None else parallel.placements[name]
        whole = name if placement is None else placement.whole
        place = Place.whole(self.shapes[whole])
        cut_by_tensor = placement is not None and placement.axis is not None
        if placement is not None and placement.half is not None:
            place = place.divided(0, 2, placement.half)
        if placement is not None and placement.axis is not None:
            place = place.divided(placement.axis, layout.tensor, here["tensor"])
        parts = layout.tensor if cut_by_tensor else 1
        first = cut_by_tensor or here["tensor"] == 0
        summed = name.rpartition(".")[2] not in KEPT_WIDE
        if not summed:
            first = first and here["replicate"] == here["shard"] == here["context"] == 0
        else:
            rank = here["shard"] * layout.context + here["context"]
            count = layout.shard * layout.context
            parts *= count
            if placement is not None and placement.expert and layout.expert > 1:
                rank, count = rank // layout.expert, layout.expert_shard
            place = place.divided(0, count, rank)
            first = first and here["replicate"] == 0
        one = ShardedParameter(
            name, whole, parameter, place, layout.world_size // parts, first, summed
        )
        assert tuple(one.local().shape) == place.size, f"{name} {one.local().shape} {place}"
        return one

    @torch.no_grad()
    def fill(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set every parameter, one at a time.

        Args:
            value: returns the values of the whole parameter of this name and shape.
        """
        for one in self.parameters:
            one.local().copy_(one.place.cut_from(value(one.whole, one.place.shape)))

    def initialize(self, seed: int) -> None:
        """Give every parameter the value that it would have in one process."""
        config = self.decoder.config
        self.fill(lambda name, shape: initial_value(config, name, shape, torch.float32, seed))

    def reduce_after_pass(self, last: bool) -> None:
        """Say whether the next backward pass is the last of its step.

        Every pass sums the gradients of its shards, in float32: a process never has more of them
        than of the weights. The sums over copies (parallel.replicate) are taken once a step.
        """
        cast(FSDPModule, self.decoder).set_requires_all_reduce(last)

    def add_up_over_rows(self, numbers: Tensor) -> Tensor:
        """Add a tensor up in place over all processes that work on other rows."""
        if self.parallel is not None:
            return self.parallel.sum_over_rows(numbers)
        dist.all_reduce(numbers)
        return numbers

    def give_up_gathered(self) -> None:
        """Free what a pass without a backward pass has left gathered, as weights may change."""
        for module in self._sharded:
            module.reshard()


def _with_copies(axis: str, layout: ParallelLayout) -> str | tuple[str, str]:
    """Return the axes over which FSDP copies (if at all) and cuts."""
    return ("replicate", axis) if layout.replicate > 1 else axis


def _sharder(
    mesh: DeviceMesh, dtype: torch.dtype, kept: set[nn.Parameter]
) -> Callable[[nn.Module, bool], Any]:
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )

    def shard(module: nn.Module, give_up: bool) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=give_up,
            ignored_params=kept,
        )

    return shard


def touch_idle_experts(decoder: Decoder) -> None:
    """Give experts that no row was sent to a gradient of zero.

    Without one, a process whose rows left an expert out would send fewer gradients than the others
    and all of them would be added up wrongly.
    """
    for block in decoder.blocks:
        if isinstance(block.feed_forward, MoE):
            _Touch(block.feed_forward)


class _Touch:
    """Watches which experts of a mixture are called, and lets the others take part with zeros."""

    def __init__(self, mixture: MoE) -> None:
        self._experts = list(mixture.experts)
        self._called: set[nn.Module] = set()
        for expert in self._experts:
            expert.register_forward_pre_hook(lambda called, _: self._called.add(called))
        mixture.register_forward_hook(self._join)

    def _join(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        idle = [expert for expert in self._experts if expert not in self._called]
        self._called.clear()
        if not idle or not torch.is_grad_enabled():
            return output
        weights = [weight for expert in idle for weight in expert.parameters()]
        joined: Tensor = _WithZeros.apply(output, *weights)  # type: ignore[no-untyped-call]
        return joined


class _WithZeros(torch.autograd.Function):
    """The identity in its first input; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=to) for shape, dtype, to in ctx.like]
        return (slopes[0], *zeros)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end in one vector, to be sent in one piece."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
