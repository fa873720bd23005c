"""The dense and the sparse feed-forward layers with their widths split and their experts spread.

Takes the place of a finished decoder's layers, with the same parameters under the same names. Knows
groups of processes, and nothing of losses and data.

M rows, D model width, X experts, K experts per token, E = M*K rows sent to experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.mlp import MLP
from jamba_lm.model.moe import MoE, round_up
from jamba_lm.model.routing import Routing
from jamba_lm.training.parallel.collectives import Group, copied, exchanged
from jamba_lm.training.parallel.region import Region, local


class ParallelMLP(MLP):
    """`MLP` over this process's part of the inner width."""

    def __init__(self, mlp: MLP, region: Region) -> None:
        """Take the place of `mlp`, whose width the group of `region` shares."""
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.region = region

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return a tensor of the shape of `x`, (..., d_model)."""
        x_MD = self.region.enter(x, batch.num_rows)
        return self.region.leave(narrow_mlp(self, x_MD, batch))


def narrow_mlp(mlp: MLP, x_MD: Tensor, batch: Batch) -> Tensor:
    """Return what this process's part of the inner width adds to the output."""
    gate, up = local(mlp.gate_proj.weight), local(mlp.up_proj.weight)
    hidden = ops.silu_gate(F.linear(x_MD, up), F.linear(x_MD, gate), backend=batch.backend)
    return F.linear(hidden, local(mlp.down_proj.weight))


class Experts(nn.Module):
    """The experts that this process holds, each under its number in the whole model."""

    def __init__(self, experts: nn.ModuleList, held: range) -> None:
        super().__init__()
        self.held = held
        for number in held:
            self.add_module(str(number), experts[number])

    def forward(self, x_ED: Tensor, shares: Sequence[int], batch: Batch) -> Tensor:
        """Run `shares[0]` rows through the first expert held, and so on.

        An expert without a row runs too: a process whose gradient were missing could not take part
        in sums with those that have one.
        """
        outputs = []
        for number, rows in zip(self.held, x_ED.split(list(shares)), strict=True):
            share = len(rows)
            spare = round_up(share) - share if share and rows.dtype == torch.bfloat16 else 0
            padded = F.pad(rows, (0, 0, 0, spare)) if spare else rows
            expert = self.get_submodule(str(number))
            assert isinstance(expert, MLP)
            outputs.append(narrow_mlp(expert, padded, batch)[:share])
        return torch.cat(outputs)


class ParallelMoE(MoE):
    """`MoE` whose experts lie on several processes, and whose rows travel to them and back."""

    def __init__(self, moe: MoE, region: Region, expert: Group) -> None:
        """Take the place of `moe`.

        Args:
            moe: its router and those of its experts that this process holds stay.
            region: who shares every expert's width.
            expert: who shares the experts; each has other rows.
        """
        nn.Module.__init__(self)
        self.experts_per_token = moe.experts_per_token
        self.num_experts = len(moe.experts)
        self.router = moe.router
        share = self.num_experts // expert.size
        held = range(expert.rank * share, (expert.rank + 1) * share)
        self.experts = Experts(moe.experts, held)  # type: ignore[assignment]
        self.region, self.expert = region, expert

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the weighted sum of the chosen experts, in the shape of `x`."""
        routed_MD, x_MD = self.region.enter_both(x, batch.num_rows)
        logits_MX = F.linear(routed_MD, local(self.router.weight))
        probability_MX = logits_MX.float().softmax(dim=-1)
        weight_MK, expert_MK = probability_MX.topk(self.experts_per_token, dim=-1)
        if batch.routing is not None:
            batch.routing.append(Routing(probability_MX, expert_MK))

        order_E = expert_MK.flatten().argsort(stable=True)
        shares_X = torch.bincount(expert_MK.flatten(), minlength=self.num_experts)
        rows_ED = x_MD.index_select(0, order_E // self.experts_per_token)
        out_ED = self._through_experts(rows_ED, shares_X, batch)
        out_MKD = out_ED.index_select(0, order_E.argsort()).unflatten(
            0, (-1, self.experts_per_token)
        )
        # Each process weighs its part of an expert's output: gradients of weights are partial.
        weight_MK = copied(weight_MK, self.region.group)
        return self.region.leave((out_MKD * weight_MK[..., None].to(x.dtype)).sum(1))

    def _through_experts(self, rows_ED: Tensor, shares_X: Tensor, batch: Batch) -> Tensor:
        """Send rows, which are in the order of experts, to the experts' holders and back."""
        if self.expert.size == 1:
            return self.experts(rows_ED, shares_X.tolist(), batch)
        sent = shares_X.view(self.expert.size, -1)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=self.expert.processes)
        sent_rows, came_rows = sent.sum(1).tolist(), came.sum(1).tolist()
        arrived = exchanged(rows_ED, sent_rows, came_rows, self.expert)
        # They arrive by sender, each sender's by expert, and are put together by expert.
        number = torch.arange(came.shape[1], device=came.device).repeat(self.expert.size)
        order = number.repeat_interleave(came.flatten()).argsort(stable=True)
        made = self.experts(arrived.index_select(0, order), came.sum(0).tolist(), batch)
        back = made.index_select(0, order.argsort())
        return exchanged(back, came_rows, sent_rows, self.expert)
