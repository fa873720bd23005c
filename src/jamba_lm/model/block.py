"""One layer: norm, mixer, norm, feed-forward, each pair added to the residual stream.

Knows the kinds of mixers and feed-forwards, and nothing of what is inside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.model.attention import AttentionMixer
from jamba_lm.model.batch import Batch
from jamba_lm.model.layout import LayerSpec
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.mlp import MLP
from jamba_lm.model.moe import MoE
from jamba_lm.model.norm import RMSNorm

MIXERS: dict[str, type[nn.Module]] = {"attention": AttentionMixer, "mamba": MambaMixer}
FEED_FORWARDS: dict[str, type[nn.Module]] = {"mlp": MLP, "moe": MoE}


class Block(nn.Module):
    """A Jamba layer, in any of its four kinds.

    Paper: Jamba §2, Figure 1(b).
    """

    def __init__(self, config: JambaConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[spec.mixer](config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FEED_FORWARDS[spec.feed_forward](config)

    def forward(self, x_MD: Tensor, batch: Batch, state: Sequence[Any] | None) -> Tensor:
        """Return the residual stream after this layer; `state` moves past these rows."""
        x_MD = x_MD + self.mixer(self.mixer_norm(x_MD, batch), batch, state)
        return x_MD + self.feed_forward(self.feed_forward_norm(x_MD, batch), batch)
