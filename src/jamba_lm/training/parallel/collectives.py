"""Sums, gathers and exchanges between processes, each with the gradient that belongs to it.

Knows rows and groups of processes, and nothing of models. Every function returns its input as it is
where the group is of one process.

A gradient is *whole* on a process when it is that of the loss, and *partial* when the processes of
the group have to add theirs up first. Which of the two comes back decides which function is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Group:
    """Processes along one axis of a mesh, and this one's place among them.

    Attributes:
        processes: None where there is only this one.
    """

    processes: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def along(cls, mesh: DeviceMesh, axis: str) -> Group:
        """Return the processes that differ from this one in their place along `axis` only."""
        one = mesh[axis]
        if one.size() == 1:
            return cls(None, 0, 1)
        return cls(one.get_group(), one.get_local_rank(), one.size())


def cut_evenly(rows: int, parts: int) -> list[int]:
    """Return the bounds of `parts` contiguous parts whose sizes differ by one at most.

    >>> cut_evenly(7, 3)
    [0, 3, 5, 7]
    """
    share, more = divmod(rows, parts)
    return [0, *accumulate(share + (part < more) for part in range(parts))]


def add_up(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` in place over the group, without a gradient."""
    if group.size > 1:
        dist.all_reduce(x, op, group.processes)
    return x


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of all processes' `x`, whose users must all give whole gradients."""
    return x if group.size == 1 else _Summed.apply(x, group)  # type: ignore[no-untyped-call]


def copied(x: Tensor, group: Group) -> Tensor:
    """Return `x`, which all processes have alike, to users that give partial gradients."""
    return x if group.size == 1 else _Copied.apply(x, group)  # type: ignore[no-untyped-call]


def summed_rows(x: Tensor, group: Group) -> Tensor:
    """Return this process's part of the rows of the sum of all processes' `x`."""
    return x if group.size == 1 else _SummedRows.apply(x, group)  # type: ignore[no-untyped-call]


def gathered_rows(x: Tensor, group: Group, rows: int) -> tuple[Tensor, Tensor]:
    """Put the parts of the rows that processes hold together.

    Args:
        x: this process's part, as `cut_evenly` says.
        group: holders of the others.
        rows: of all parts.

    Returns:
        All rows, twice: first for users that give whole gradients, then for users that give
        partial ones.
    """
    if group.size == 1:
        return x, x
    return _GatheredRows.apply(x, group, rows)  # type: ignore[no-untyped-call]


def shown_to_all(carrier: Tensor, x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Let every process see the `x` of all, of one shape: `[size, *x.shape]`.

    The way back is taken together, by a process that looked at nothing too. It therefore hangs on
    `carrier`, which is returned as it is and must be on the way from the loss to every process.
    """
    if group.size == 1:
        return carrier, x[None]
    return _ShownToAll.apply(carrier, x, group)  # type: ignore[no-untyped-call]


def exchanged(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send the first `sent[0]` rows to the first process, and so on; return what came in.

    Args:
        x: rows for the processes, in their order.
        sent: rows for each process.
        received: rows from each process.
        group: all of them; each says what the others expect.
    """
    if group.size == 1:
        return x
    return _Exchanged.apply(x, list(sent), list(received), group)  # type: ignore[no-untyped-call]


def _gather(x: Tensor, group: Group, rows: int) -> Tensor:
    bounds = cut_evenly(rows, group.size)
    longest = bounds[1]
    if len(x) < longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    whole = x.new_empty(group.size * longest, *x.shape[1:])
    dist.all_gather_single(whole, x.contiguous(), group.processes)
    if len(whole) == rows:
        return whole
    sizes = [end - first for first, end in pairwise(bounds)]
    parts = whole.split(longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    bounds = cut_evenly(len(x), group.size)
    longest, own = bounds[1], bounds[group.rank + 1] - bounds[group.rank]
    if len(x) < group.size * longest:
        padded = x.new_zeros(group.size, longest, *x.shape[1:])
        for place, (first, end) in zip(padded, pairwise(bounds), strict=True):
            place[: end - first] = x[first:end]
        x = padded.flatten(0, 1)
    part = x.new_empty(longest, *x.shape[1:])
    dist.reduce_scatter_single(part, x.contiguous(), group=group.processes)
    return part[:own]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return add_up(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return add_up(slopes[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _SummedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return _gather(slopes[0], ctx.group, ctx.rows), None


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: int) -> tuple[Tensor, Tensor]:
        ctx.group = group
        # One of the two may have no user at all.
        ctx.set_materialize_grads(False)
        whole = _gather(x, group, rows)
        bounds = cut_evenly(rows, group.size)
        ctx.own = slice(bounds[group.rank], bounds[group.rank + 1])
        return whole, whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, None, None]:
        whole, partial = slopes
        found = None if partial is None else _reduce_scatter(partial, ctx.group)
        if whole is not None:
            found = whole[ctx.own] if found is None else found + whole[ctx.own]
        return found, None, None


class _ShownToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        ctx.group = group
        shown = x.new_empty(group.size, *x.shape)
        dist.all_gather_single(shown.flatten(0, 1), x.contiguous(), group.processes)
        return carrier.view_as(carrier), shown

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        carried, shown = slopes
        found = shown.new_empty(shown.shape[1:])
        together = shown.flatten(0, 1).contiguous()
        dist.reduce_scatter_single(found, together, group=ctx.group.processes)
        return carried, found, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(slopes[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group.processes)
    return arrived
