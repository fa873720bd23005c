"""Small models of every arm, with weights in which no term is invisible."""

from __future__ import annotations

import torch

from jamba_lm.config import JambaConfig
from jamba_lm.language_model import LanguageModel, from_config

SMALL = JambaConfig(
    vocab_size=97,
    d_model=32,
    d_ff=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    attention_period=4,
    attention_offset=2,
    expert_period=2,
    expert_offset=1,
    num_experts=4,
    experts_per_token=2,
    state_size=16,
    conv_width=4,
    dt_rank=3,
    initializer_range=0.2,
)

ARMS: dict[str, JambaConfig] = {
    "hybrid with experts": SMALL,
    "hybrid, dense": SMALL.replace(num_experts=1),
    "only Mamba": SMALL.replace(attention_period=5, attention_offset=4, num_experts=1),
    "only attention, rotary": SMALL.replace(
        attention_period=1, attention_offset=0, position="rope", num_experts=1
    ),
    "hybrid, rotary": SMALL.replace(position="rope"),
    "no inner norms": SMALL.replace(inner_norms=False),
    "narrow convolution, tied, one key head": SMALL.replace(
        conv_width=2, tie_embeddings=True, num_kv_heads=1, conv_bias=False, proj_bias=True
    ),
    "odd sizes": SMALL.replace(
        d_model=20, expand=1, state_size=5, conv_width=3, num_heads=2, d_head=6, num_layers=3
    ),
}


def shaken_model(
    config: JambaConfig, *, backend: str | None = None, dtype: str = "fp32", seed: int = 0
) -> LanguageModel:
    """Make a model whose gains, biases and decays are not at their neutral values."""
    model = from_config(config, seed=seed, dtype=dtype, backend=backend)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("norm.weight", "skip_C", "bias", "dt_bias_C", "log_decay_CN")):
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def random_ids(config: JambaConfig, count: int, *, seed: int = 0) -> list[int]:
    """Draw `count` token ids."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (count,), generator=draw).tolist()
