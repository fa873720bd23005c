"""The Transformers that the papers compare Jamba with, as shapes.

A Transformer is a Jamba of attention layers only, so the same arithmetic counts both. Shapes to
plan with; their weights are not read here.

Paper: Jamba (arXiv 2403.19887) Table 1, Figures 2 and 3. Source: the models' `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jamba_lm.config import JambaConfig

_LLAMA_2_7B = JambaConfig(
    vocab_size=32000,
    d_ff=11008,
    num_kv_heads=32,
    attention_period=1,
    attention_offset=0,
    expert_period=1,
    expert_offset=0,
    num_experts=1,
    position="rope",
    pad_id=None,
    context_length=4096,
)
_MISTRAL_7B = _LLAMA_2_7B.replace(d_ff=14336, num_kv_heads=8, context_length=32768)

COMPARATORS: Mapping[str, JambaConfig] = MappingProxyType(
    {
        "llama-2-7b": _LLAMA_2_7B,
        "llama-2-13b": _LLAMA_2_7B.replace(
            d_model=5120, d_ff=13824, num_layers=40, num_heads=40, num_kv_heads=40
        ),
        "llama-2-70b": _LLAMA_2_7B.replace(
            d_model=8192, d_ff=28672, num_layers=80, num_heads=64, num_kv_heads=8
        ),
        "mistral-7b": _MISTRAL_7B,
        "mixtral-8x7b": _MISTRAL_7B.replace(num_experts=8),
    }
)
