"""The same computation with several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def same_bits_with_any_threads(compute: Callable[[], Tensor]) -> bool:
    """Whether one, two and five threads give the same; torch's number is put back."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(found[0], one) for one in found[1:])
