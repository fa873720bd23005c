"""How activations enter and leave what tensor-parallel processes have split, and local weights.

Between the split parts every process has all rows (tensor parallel), or its part of them (sequence
parallel). Knows no layer.

Source: Megatron-LM (arXiv 1909.08053) §3, the operators f and g; sequence parallel: Korthikanti et
al. (arXiv 2205.05198) §4.2.2, their g and its conjugate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from jamba_lm.training.parallel.collectives import (
    Group,
    copied,
    gathered_rows,
    summed,
    summed_rows,
)


def local(weight: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True, slots=True)
class Region:
    """The border of a part of the model whose matrices are split over a group.

    Attributes:
        group: the processes that share the matrices.
        sequence: whether they share the rows outside.
    """

    group: Group
    sequence: bool

    def enter(self, x: Tensor, rows: int) -> Tensor:
        """Return all rows to users that are split; `rows` counts those of all processes."""
        if self.sequence:
            return gathered_rows(x, self.group, rows)[1]
        return copied(x, self.group)

    def enter_both(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return all rows to users that are alike on all processes, and to users that are split."""
        if self.sequence:
            return gathered_rows(x, self.group, rows)
        return x, copied(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Add up what the split parts made, and return the rows that go on here."""
        return summed_rows(x, self.group) if self.sequence else summed(x, self.group)

    def outside(self, weight: Tensor) -> Tensor:
        """Return a parameter that is applied to the rows outside, alike on all processes."""
        return copied(local(weight), self.group) if self.sequence else local(weight)

    def inside(self, weight: Tensor) -> Tensor:
        """Return a parameter that all processes hold whole, and of which each uses a part."""
        return copied(local(weight), self.group)
