"""The sparse feed-forward layer: a router and its experts.

Knows nothing of sequences: rows of all of them are routed together, and none is dropped.

M rows, D model width, X experts, K experts per token, E = M*K rows sent to experts.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.model.batch import Batch
from jamba_lm.model.mlp import MLP
from jamba_lm.model.routing import Routing


class MoE(nn.Module):
    """A mixture of `num_experts` MLPs, `experts_per_token` of them per token.

    The chosen probabilities are not rescaled to sum to one: the published weights were trained
    that way (transformers, vLLM and llama.cpp agree; mlx-lm rescales).

    Paper: Jamba §2 (n = 16, K = 2). Source: transformers `JambaSparseMoeBlock`.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))

    def forward(self, x_MD: Tensor, batch: Batch) -> Tensor:
        """Return the weighted sum of the chosen experts, in the shape of `x_MD`."""
        probability_MX = self.router(x_MD).float().softmax(dim=-1)
        weight_MK, expert_MK = probability_MX.topk(self.experts_per_token, dim=-1)
        if batch.routing is not None:
            batch.routing.append(Routing(probability_MX, expert_MK))

        # Rows sorted by expert make each expert's share one slice: no row is masked or dropped,
        # and sums run in a fixed order, so results repeat bit for bit.
        order_E = expert_MK.flatten().argsort(stable=True)
        shares = torch.bincount(expert_MK.flatten(), minlength=len(self.experts)).tolist()
        sources = list((order_E // self.experts_per_token).split(shares))
        place_E = torch.empty_like(order_E)
        place_E[order_E] = torch.arange(len(order_E), device=order_E.device)
        if x_MD.dtype == torch.bfloat16:
            spares = [round_up(share) - share for share in shares]
            sources = [F.pad(rows, (0, spare)) for rows, spare in zip(sources, spares, strict=True)]
            before = torch.tensor([0, *accumulate(spares)][:-1], device=order_E.device)
            place_E += before[expert_MK.flatten()]
        # All rows in one piece: a gradient of its own for each expert's would be as large as x.
        sizes = [len(rows) for rows in sources]
        rows_of_expert = x_MD.index_select(0, torch.cat(sources)).split(sizes)
        outputs = [
            expert(rows, batch)
            for expert, rows in zip(self.experts, rows_of_expert, strict=True)
            if len(rows)
        ]
        out_MKD = torch.cat(outputs).index_select(0, place_E).unflatten(0, expert_MK.shape)
        return (out_MKD * weight_MK[..., None].to(x_MD.dtype)).sum(1)


def round_up(rows: int) -> int:
    """Return a number of rows that experts are given: few different ones, none much larger.

    oneDNN compiles a bfloat16 kernel for every new number of rows, which takes twenty times as
    long as a product of 1,000 rows itself. The rows that fill up are copies whose results nobody
    reads.
    """
    if rows == 0:
        return 0
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 128) * 128
