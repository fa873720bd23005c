"""Weights where the allocator would put them, for comparisons to the bit.

On some processors the bits of torch's own products depend on where a matrix begins in memory, and
in a mapped file a tensor begins where the one before it ended.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def aligned(module: Module) -> Module:
    """Move every weight of a module to memory of its own; return the module."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
