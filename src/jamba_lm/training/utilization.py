"""How much of the arithmetic of a training step is the matrix products that it cannot do without.

Knows shapes, and nothing of how a step is carried out.
"""

from __future__ import annotations

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers


def product_weights(config: JambaConfig) -> int:
    """Return how many weights each token is multiplied by: those of its experts, and the head's.

    The convolution, the scan and attention's scores are left out: they are not products with
    weights, and together a few percent.
    """
    width, channels = config.d_model, config.d_inner
    rank, states, ff = config.dt_rank, config.state_size, config.d_ff
    mamba = width * 2 * channels + channels * (rank + 2 * states) + rank * channels
    mamba += channels * width
    query, key = (heads * config.d_head for heads in (config.num_heads, config.num_kv_heads))
    attention = width * (2 * query + 2 * key)
    total = width * config.vocab_size
    for layer in plan_layers(config):
        total += attention if layer.mixer == "attention" else mamba
        if layer.feed_forward == "moe":
            total += width * config.num_experts + config.experts_per_token * 3 * width * ff
        else:
            total += 3 * width * ff
    return total


def training_flops(config: JambaConfig, tokens: int) -> float:
    """Return the floating-point operations of forward and backward over `tokens`.

    Each weight is multiplied and added once forward and twice backward. What is computed again to
    save memory does not count: it is not needed, it is a choice.
    """
    return 6.0 * product_weights(config) * tokens
