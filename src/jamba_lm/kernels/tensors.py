"""What the files named `native_*` ask of a tensor before they hand it to the library."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_lm.kernels.library import loaded_library


def address(x: Tensor | None) -> int:
    """Return where the values of `x` begin, 0 for None: a null pointer in C."""
    return 0 if x is None else x.data_ptr()


def with_unit_columns(x: Tensor) -> Tensor:
    """Return `x`, copied only when neighbours of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gradient_is_needed(*tensors: Tensor | None) -> bool:
    """Say whether autograd will ask for the gradient of any of `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# JAMBA_EXP2 .. JAMBA_SIGMOID of native/jamba_kernels.h.
_VECTOR_FUNCTIONS = ("exp2", "exp", "softplus", "sigmoid")


def evaluate(path: str, function: str, x: Tensor) -> Tensor:
    """Apply a vector function of the kernels to contiguous float32 `x`, for tests of its error."""
    library = loaded_library()
    y = torch.empty_like(x)
    library.handle.jamba_vector_function(
        library.path_code(path),
        _VECTOR_FUNCTIONS.index(function),
        x.data_ptr(),
        y.data_ptr(),
        x.numel(),
    )
    return y
