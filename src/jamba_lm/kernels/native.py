"""The CPU back-end: C++ kernels, and torch's own fused kernel for attention.

It knows no model, only which operations it has and which tensors they take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_lm.kernels.fused_attention import attention
from jamba_lm.kernels.library import find_library, loaded_library
from jamba_lm.kernels.native_conv import causal_conv
from jamba_lm.kernels.native_products import packed_linear
from jamba_lm.kernels.native_rows import rms_norm, silu_gate
from jamba_lm.kernels.native_scan import selective_scan
from jamba_lm.kernels.native_softmax import softmax_slopes_, softmax_sums

__all__ = [
    "OPERATIONS",
    "attention",
    "causal_conv",
    "method",
    "packed_linear",
    "rms_norm",
    "selective_scan",
    "silu_gate",
    "softmax_slopes_",
    "softmax_sums",
    "why_not",
]

OPERATIONS = frozenset(
    {
        *("causal_conv", "selective_scan", "attention", "rms_norm", "silu_gate", "packed_linear"),
        *("softmax_sums", "softmax_slopes_"),
    }
)

_DTYPES = (torch.float32, torch.bfloat16)


def why_not(op: str, *tensors: Tensor | None) -> str | None:
    """Say why `op` cannot run here on `tensors`, or None when it can."""
    if op not in OPERATIONS:
        return f"it has no operation {op!r}"
    if op == "attention":
        return None  # torch's kernel needs no library and takes any device and type
    library = find_library()
    if isinstance(library, str):
        return library
    for x in tensors:
        if x is None:
            continue
        if not x.is_cpu:
            return f"a tensor is on {x.device}, not on the CPU"
        if x.dtype not in _DTYPES:
            return f"a tensor is {x.dtype}, the kernel takes torch.float32 and torch.bfloat16"
    return None


def method(op: str) -> str:
    """Say how `op` is computed here, for a person.

    Raises:
        BackendUnavailable: the library cannot be used.
    """
    if op == "attention":
        return "torch scaled_dot_product_attention"
    return f"C++, {loaded_library().paths_here[0]}"
