"""The dense feed-forward layer: SwiGLU.

Knows nothing of sequences: every row is on its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch


class MLP(nn.Module):
    """down(silu(gate x) * up x), without biases. One expert of a mixture is also an `MLP`.

    Paper: Jamba §2 (SwiGLU). Source: transformers `JambaMLP`.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return a tensor of the shape of `x`, (..., d_model)."""
        hidden = ops.silu_gate(self.up_proj(x), self.gate_proj(x), backend=batch.backend)
        return self.down_proj(hidden)
