"""Low-rank changes of a model's matrices, held by the decoder's own names.

Knows what an adapter does to weights, and nothing of files.

O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.model.decoder import Decoder


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change of a matrix: W becomes W + scale * up @ down.

    Attributes:
        down_RI: what PEFT calls lora_A.
        up_OR: what PEFT calls lora_B.
        scale: alpha / rank, or alpha / sqrt(rank).
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """How many directions the change has, at most."""
        return self.down_RI.shape[0]

    @property
    def num_values(self) -> int:
        """Values of both factors."""
        return self.down_RI.numel() + self.up_OR.numel()

    def delta(self) -> Tensor:
        """Return the change, float32 [O, I]."""
        return (self.up_OR.float() @ self.down_RI.float()).mul_(self.scale)

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """Return the changed matrix in its own type: summed in float32, rounded once."""
        return self.delta().add_(weight_OI.float()).to(weight_OI.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What an adapter changes.

    Attributes:
        changes: by the name of the changed weight, as the decoder has it.
        replaced: weights that take the place of the model's, likewise; changes are added to them.
        base: what the adapter says it was made for; None when it does not say.
    """

    changes: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None

    @property
    def num_values(self) -> int:
        """Values of all that the adapter holds."""
        low_rank = sum(change.num_values for change in self.changes.values())
        return low_rank + sum(value.numel() for value in self.replaced.values())

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight `name` as the adapter changes it, in the type of `weight`.

        Raises:
            CheckpointError: it is no longer finite.
        """
        changed = weight
        if name in self.replaced:
            changed = self.replaced[name].to(weight.dtype)
        if name in self.changes:
            changed = self.changes[name].added_to(changed)
        if changed is not weight and not torch.isfinite(changed).all():
            raise CheckpointError(
                f"{name} holds NaN or infinity once the adapter is added: was it saved after its "
                "training had diverged?"
            )
        return changed


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a model as an adapter changes them, each made when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], adapter: Adapter) -> None:
        self._weights, self._adapter = weights, adapter

    def __getitem__(self, own: str) -> Tensor:
        return self._adapter.merged(own, self._weights[own])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def merge_into(decoder: Decoder, adapter: Adapter) -> None:
    """Change the weights of `decoder` in place.

    Raises:
        InputError: one of the matrices is quantised.
        CheckpointError: a weight is no longer finite.
    """
    for name in {**adapter.changes, **adapter.replaced}:
        owner, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(owner)
        weight = dict(module.named_parameters(recurse=False)).get(leaf)
        if weight is None:
            raise InputError(
                f"{name} is quantised, and an adapter cannot be added to it: merge the adapter "
                "into the original model first, and quantise the result"
            )
        # A new parameter: the old one may be a memory map, which cannot be written to.
        setattr(module, leaf, nn.Parameter(adapter.merged(name, weight.detach())))
