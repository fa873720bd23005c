"""Grouped-query attention, with no positions or, when the config says so, rotary ones.

Does not know how keys and values are kept: it hands them to the state and gets blocks back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.state import KeyValueState


class AttentionMixer(nn.Module):
    """Causal softmax attention of H query heads over G groups of keys and values.

    Jamba gives attention no positional signal at all: the Mamba layers around it carry order.
    `position = "rope"` is the paper's comparison arm.

    Paper: Jamba §2 and Table 8. Source: transformers `JambaAttention` (scale P^-0.5, no biases).
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.d_head = config.d_head
        self.rope_theta = config.rope_theta if config.position == "rope" else None
        query_width = config.num_heads * config.d_head
        key_width = config.num_kv_heads * config.d_head
        self.q_proj = nn.Linear(config.d_model, query_width, bias=False)
        self.k_proj = nn.Linear(config.d_model, key_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.d_model, bias=False)

    def forward(self, x_MD: Tensor, batch: Batch, state: Sequence[KeyValueState] | None) -> Tensor:
        """Mix the rows of each sequence with what came before; `state` moves past them."""
        q_MHP = self.q_proj(x_MD).unflatten(-1, (-1, self.d_head))
        k_MGP = self.k_proj(x_MD).unflatten(-1, (-1, self.d_head))
        v_MGP = self.v_proj(x_MD).unflatten(-1, (-1, self.d_head))
        if self.rope_theta is not None:
            turn_MP = rotary_angles(batch.positions(), self.d_head, self.rope_theta)
            q_MHP, k_MGP = rotate(q_MHP, turn_MP), rotate(k_MGP, turn_MP)

        keys, values = [], []
        for index, (first, end) in enumerate(batch.spans()):
            k_TGP, v_TGP = k_MGP[first:end], v_MGP[first:end]
            if state is None:
                keys.append([k_TGP])
                values.append([v_TGP])
            else:
                state[index].append(k_TGP, v_TGP)
                keys.append(state[index].key_blocks())
                values.append(state[index].value_blocks())
        y_MHP = ops.attention(
            q_MHP, keys, values, batch.offsets, self.d_head**-0.5, backend=batch.backend
        )
        return self.o_proj(y_MHP.flatten(1))


def rotary_angles(positions_M: Tensor, d_head: int, theta: float) -> Tensor:
    """Return the angle of each position and channel, float32 [M, P], halves repeated.

    Paper: RoFormer §3.4.2; the two-halves layout is that of transformers' Llama family.
    """
    half = torch.arange(0, d_head, 2, dtype=torch.float64) / d_head
    turn_MP = positions_M.double()[:, None] * theta**-half
    return torch.cat([turn_MP, turn_MP], dim=-1).float()


def rotate(x_MHP: Tensor, turn_MP: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + P/2) of every head by their angle, in float32."""
    cos_M1P = turn_MP.cos()[:, None].to(x_MHP.device)
    sin_M1P = turn_MP.sin()[:, None].to(x_MHP.device)
    wide_MHP = x_MHP.float()
    left, right = wide_MHP.chunk(2, dim=-1)
    turned_MHP = torch.cat([-right, left], dim=-1)
    return (wide_MHP * cos_M1P + turned_MHP * sin_M1P).to(x_MHP.dtype)
