"""The two mixers with their heads and channels split, and documents that go on to the next process.

Takes the place of a finished decoder's mixers, with the same parameters under the same names. Knows
groups of processes, and nothing of losses and data.

M rows, C channels held here, N state size, L = convolution taps - 1, R rank of dt, K processes of a
context group, T rows of the piece that continues, H query heads held here, G key/value heads held
here, P width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.kernels import ops
from jamba_lm.model.attention import AttentionMixer, rotary_angles, rotate
from jamba_lm.model.batch import Batch
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.state import KeyValueState, MambaState
from jamba_lm.training.parallel.collectives import Group, copied, summed
from jamba_lm.training.parallel.neighbours import continued_scan, inputs_before, rows_before
from jamba_lm.training.parallel.region import Region, local
from jamba_lm.training.parallel.row_cut import ContextBatch, RowCut
from jamba_lm.training.watching import Taps


def cut_of(batch: Batch) -> RowCut | None:
    """Return how the batch is cut, where some document is."""
    if isinstance(batch, ContextBatch) and batch.cut.crosses:
        return batch.cut
    return None


class ParallelAttention(AttentionMixer):
    """`AttentionMixer` over this process's heads and rows."""

    def __init__(self, mixer: AttentionMixer, region: Region, context: Group, groups: int) -> None:
        """Take the place of `mixer`.

        Args:
            mixer: its modules become this one's.
            region: who shares the heads.
            context: who shares the rows.
            groups: key/value heads of the whole model.
        """
        nn.Module.__init__(self)
        self.d_head, self.rope_theta = mixer.d_head, mixer.rope_theta
        self.q_proj, self.k_proj = mixer.q_proj, mixer.k_proj
        self.v_proj, self.o_proj = mixer.v_proj, mixer.o_proj
        self.region, self.context, self.groups = region, context, groups

    def forward(self, x: Tensor, batch: Batch, state: Sequence[KeyValueState] | None) -> Tensor:
        """Mix the rows of each document, also with those that processes on the left hold."""
        assert state is None, "a parallel decoder trains, and remembers nothing"
        x_MD = self.region.enter(x, batch.num_rows)
        q_MHP = F.linear(x_MD, local(self.q_proj.weight)).unflatten(-1, (-1, self.d_head))
        k_MGP = F.linear(x_MD, self._own_groups(self.k_proj)).unflatten(-1, (-1, self.d_head))
        v_MGP = F.linear(x_MD, self._own_groups(self.v_proj)).unflatten(-1, (-1, self.d_head))
        if self.rope_theta is not None:
            turn_MP = rotary_angles(batch.positions(), self.d_head, self.rope_theta)
            q_MHP, k_MGP = rotate(q_MHP, turn_MP), rotate(k_MGP, turn_MP)
        cut = cut_of(batch)
        left: list[tuple[Tensor, Tensor]] = []
        if cut is not None:
            q_MHP, left = rows_before(q_MHP, k_MGP, v_MGP, cut, self.context)
        keys, values = [], []
        for first, end in batch.spans():
            keys.append([*(k for k, _ in left), k_MGP[first:end]])
            values.append([*(v for _, v in left), v_MGP[first:end]])
            left = []
        y_MHP = ops.attention(
            q_MHP, keys, values, batch.offsets, self.d_head**-0.5, backend=batch.backend
        )
        return self.region.leave(F.linear(y_MHP.flatten(1), local(self.o_proj.weight)))

    def _own_groups(self, projection: nn.Linear) -> Tensor:
        """Return the rows of a key or value projection that this process's heads look at."""
        group = self.region.group
        if self.groups % group.size == 0:
            return local(projection.weight)
        first = group.rank * self.groups // group.size * self.d_head
        return self.region.inside(projection.weight)[first : first + self.d_head]


class InProjection(nn.Module):
    """Mamba's in_proj, taken apart into the halves that are convolved and that gate.

    A half each for every process would be the wrong cut: every process needs the same channels of
    both.
    """

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        channels, bias = whole.out_features // 2, whole.bias is not None
        with torch.device("meta"):
            self.u = nn.Linear(whole.in_features, channels, bias=bias)
            self.gate = nn.Linear(whole.in_features, channels, bias=bias)


class ParallelMamba(MambaMixer):
    """`MambaMixer` over this process's channels and rows."""

    def __init__(self, mixer: MambaMixer, region: Region, context: Group) -> None:
        """Take the place of `mixer`.

        Args:
            mixer: its modules and parameters become this one's, but `in_proj`.
            region: who shares the channels.
            context: who shares the rows.
        """
        nn.Module.__init__(self)
        self.split_sizes = mixer.split_sizes
        self.in_proj = InProjection(mixer.in_proj)  # type: ignore[assignment]
        self.conv_CW, self.conv_bias_C = mixer.conv_CW, mixer.conv_bias_C
        self.x_proj, self.dt_proj, self.out_proj = mixer.x_proj, mixer.dt_proj, mixer.out_proj
        self.dt_norm, self.B_norm, self.C_norm = mixer.dt_norm, mixer.B_norm, mixer.C_norm
        self.dt_bias_C, self.log_decay_CN = mixer.dt_bias_C, mixer.log_decay_CN
        self.skip_C = mixer.skip_C
        self.region, self.context = region, context
        self.taps = Taps()

    def forward(self, x: Tensor, batch: Batch, state: Sequence[MambaState] | None) -> Tensor:
        """Mix the rows of each document, continuing from the process on the left."""
        assert state is None, "a parallel decoder trains, and remembers nothing"
        region, cut = self.region, cut_of(batch)
        x_MD = region.enter(x, batch.num_rows)
        halves = cast(InProjection, self.in_proj)
        u_MC, gate_MC = self._projected(x_MD, halves.u), self._projected(x_MD, halves.gate)

        conv_CW, before_BLC = local(self.conv_CW), None
        if cut is not None:
            u_MC, before_BLC = inputs_before(
                u_MC, conv_CW.shape[1] - 1, len(batch.lengths), cut, self.context
            )
        conv_bias_C = None if self.conv_bias_C is None else local(self.conv_bias_C)
        u_MC, _ = ops.causal_conv(
            u_MC,
            conv_CW,
            conv_bias_C,
            batch.offsets,
            before_BLC,
            silu=True,
            backend=batch.backend,
        )
        # A sum over channels: the small product that all processes must have whole.
        chosen = summed(F.linear(u_MC, local(self.x_proj.weight)), region.group)
        dt_MR, B_MN, C_MN = self.taps.see("x_proj", chosen).split(self.split_sizes, dim=-1)
        # Normalised alike everywhere, then used by each process's own channels.
        dt_MR, B_MN, C_MN = (
            self.dt_norm(dt_MR, batch),
            self.B_norm(B_MN, batch),
            self.C_norm(C_MN, batch),
        )
        if region.group.size > 1:
            together = copied(torch.cat([dt_MR, B_MN, C_MN], -1), region.group)
            dt_MR, B_MN, C_MN = together.split(self.split_sizes, dim=-1)
        y_MC = continued_scan(
            u_MC,
            self.taps.see("dt_proj", F.linear(dt_MR, local(self.dt_proj.weight))),
            local(self.dt_bias_C),
            -local(self.log_decay_CN).exp(),
            B_MN,
            C_MN,
            local(self.skip_C),
            batch,
            cut,
            self.context,
        )
        y_MC = self.taps.see("gated", ops.silu_gate(y_MC, gate_MC, backend=batch.backend))
        y = region.leave(F.linear(y_MC, local(self.out_proj.weight)))
        return y if self.out_proj.bias is None else y + region.outside(self.out_proj.bias)

    def _projected(self, x_MD: Tensor, half: nn.Linear) -> Tensor:
        bias_C = None if half.bias is None else local(half.bias)
        return self.taps.see("in_proj", F.linear(x_MD, local(half.weight), bias_C))
