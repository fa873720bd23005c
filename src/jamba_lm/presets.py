"""Models by name: the released ones, some to train, and the benchmark shapes.

Only shapes, and where the weights of the embedded one are; others come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import closest, shown
from jamba_lm.errors import ConfigError

_MINI = JambaConfig()
_REASONING_3B = JambaConfig(
    d_model=2560,
    d_ff=8192,
    num_layers=28,
    num_heads=20,
    num_kv_heads=1,
    attention_period=14,
    attention_offset=7,
    num_experts=1,
    tie_embeddings=True,
    eos_ids=(2, 519),
)
_SMALL = JambaConfig(
    vocab_size=16384,
    d_model=256,
    d_ff=512,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
)

PRESETS: Mapping[str, JambaConfig] = MappingProxyType(
    {
        "jamba-v0.1": _MINI,
        "jamba-1.5-mini": _MINI.replace(eos_ids=(2, 518)),
        # The paper (arXiv 2408.12570) gives neither d_ff nor dt_rank: these reproduce its totals,
        # 398B and 94B active.
        "jamba-1.5-large": _MINI.replace(
            d_model=8192, d_ff=24576, num_layers=72, num_heads=64, eos_ids=(2, 518)
        ),
        "jamba-reasoning-3b": _REASONING_3B,
        "jamba2-mini": _MINI.replace(eos_ids=(519,)),
        # The model inside this package.
        "demo": _SMALL.replace(vocab_size=4096, d_ff=128, num_experts=8, tie_embeddings=True),
        # The same six times as large, for a run of two hours on two cores.
        "demo-50m": _SMALL.replace(
            vocab_size=8192,
            d_model=384,
            num_heads=6,
            num_experts=16,
            tie_embeddings=True,
        ),
        # Two blocks of eight layers: 104 million parameters, 57 million of them active.
        "100m": _SMALL.replace(
            d_model=512, d_ff=640, num_layers=16, num_heads=8, num_experts=8, tie_embeddings=True
        ),
        # The paper gives numbers of parameters for its ablations, and no shapes. Attention is in
        # layers 4, 12 and 20 of the smaller one, where the paper shows heads.
        "ablation-1.3b": _MINI.replace(
            d_model=2048, d_ff=3072, num_layers=24, num_heads=16, num_kv_heads=4, num_experts=1
        ),
        "ablation-7b": _MINI.replace(d_ff=8704, num_experts=1),
        # Shapes to measure with, not models to use.
        "tiny": _SMALL,
        "mid": _SMALL.replace(
            vocab_size=65536,
            d_model=1024,
            d_ff=1792,
            num_heads=16,
            num_kv_heads=4,
            num_experts=16,
        ),
        "3b": _REASONING_3B.replace(eos_ids=(2,)),
    }
)


def preset(name: str) -> JambaConfig:
    """Return the model called `name`.

    Raises:
        ConfigError: there is none; the message names the closest one, and all.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"no preset {shown(name)} among {', '.join(PRESETS)}{closest(name, PRESETS)}"
        )
    return PRESETS[name]


def embedded_model_path() -> Path:
    """Return the folder of the small model that is part of the package."""
    return Path(__file__).parent / "embedded"
