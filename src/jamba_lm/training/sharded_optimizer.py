"""AdamW on parameters that are spread over processes.

Knows parameters by name and where they lie, and neither data nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from jamba_lm.training.checkpointing import check_fit
from jamba_lm.training.optimizer import PARTS, decays, whole_norm
from jamba_lm.training.places import Place
from jamba_lm.training.processes import Processes
from jamba_lm.training.recipe import OptimizerSection
from jamba_lm.training.sharded_files import part_of
from jamba_lm.training.sharding import ShardedDecoder, ShardedParameter, flat


class ShardedAdamW:
    """AdamW whose float32 weights, gradients and moments lie where FSDP has put the parameters.

    The sharded parameters are the master weights themselves: FSDP rounds them to the type that is
    computed in whenever it gathers them. What is known of all processes is the same in each.
    """

    def __init__(
        self, sharded: ShardedDecoder, settings: OptimizerSection, processes: Processes
    ) -> None:
        """Start without moments.

        Args:
            sharded: its values may still be set.
            settings: the recipe's optimizer section.
            processes: that hold the other shards.
        """
        self._sharded = sharded
        self._settings = settings
        self._processes = processes
        self._parameters = sharded.parameters
        self._first = [torch.zeros_like(one.local()) for one in self._parameters]
        self._second = [torch.zeros_like(one.local()) for one in self._parameters]
        self._decay = [
            settings.weight_decay if decays(one.name, one.parameter) else 0.0
            for one in self._parameters
        ]
        self._steps_done = 0

    def collect(self, count: int = 1, *, last: bool = True) -> None:
        """Do nothing: gradients are added up where they arise."""

    def forget(self) -> None:
        """Throw away the gradients of the step that is now not taken."""
        for one in self._parameters:
            one.parameter.grad = None

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the gradient of each parameter of the whole model, by its name.

        To be called once, after the last pass of a step, by all processes.
        """
        self._add_up_own()
        squares = dict.fromkeys(self._sharded.shapes, 0.0)
        for one in self._parameters:
            gradient = one.gradient()
            if gradient is not None and gradient.numel():
                norm = torch.linalg.vector_norm(gradient).item()
                squares[one.whole] += norm * norm / one.copies
        found = self._processes.add_up(torch.tensor(list(squares.values()), dtype=torch.float64))
        return dict(zip(squares, found.sqrt().tolist(), strict=True))

    def _add_up_own(self) -> None:
        own = [one for one in self._parameters if not one.summed]
        if not own:
            return
        for one in own:
            if one.parameter.grad is None:
                one.parameter.grad = torch.zeros_like(one.parameter)
        gradients = [gradient for one in own if (gradient := one.gradient()) is not None]
        together = self._sharded.add_up_over_rows(flat(gradients))
        for gradient, values in zip(
            gradients, together.split([one.numel() for one in gradients]), strict=True
        ):
            gradient.copy_(values.view_as(gradient))

    @torch.no_grad()
    def step(self, learning_rate: float, norm: float | None = None) -> float:
        """Take one step along the gradients.

        Args:
            learning_rate: of this step.
            norm: of the gradient of all processes, when it is known.

        Returns:
            The norm of the gradient before it was clipped. When it is not finite, nothing was
            changed, and the gradients are forgotten.
        """
        if norm is None:
            norm = whole_norm(self.gradient_norms())
        if not math.isfinite(norm):
            self.forget()
            return norm
        settings = self._settings
        shrink = settings.clip_norm / norm if norm > settings.clip_norm else 1.0
        for number, one in enumerate(self._parameters):
            values = one.local()
            gradient = one.gradient()
            if not values.numel():
                continue
            if gradient is None:
                gradient = torch.zeros_like(values)
            adamw(
                [values],
                [gradient.mul_(shrink) if shrink != 1.0 else gradient],
                [self._first[number]],
                [self._second[number]],
                [],
                [torch.tensor(float(self._steps_done), device=values.device)],
                fused=True,
                amsgrad=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=learning_rate,
                weight_decay=self._decay[number],
                eps=settings.eps,
                maximize=False,
            )
        self._steps_done += 1
        self.forget()
        return norm

    def _held(self) -> Iterator[tuple[str, ShardedParameter, Tensor]]:
        """Yield all that must be kept to go on, as far as it is here, and what it is called."""
        for number, one in enumerate(self._parameters):
            values = (one.local(), self._first[number], self._second[number])
            for part, tensor in zip(PARTS, values, strict=True):
                yield part, one, tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what this process is to save, by `part.parameter`: views."""
        return {
            f"{part}.{one.name}": tensor
            for part, one, tensor in self._held()
            if one.owned and tensor.numel()
        }

    def places(self) -> dict[str, tuple[str, Place]]:
        """Return of what each of `tensors` is a part, and where in it."""
        return {
            f"{part}.{one.name}": (f"{part}.{one.whole}", one.place)
            for part, one, tensor in self._held()
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Take this process' part of saved tensors, whichever mesh saved them.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not float32.
        """
        wanted = self._sharded.shapes.items()
        check_fit({f"{part}.{name}": shape for part in PARTS for name, shape in wanted}, tensors)
        for part, one, tensor in self._held():
            tensor.copy_(part_of(tensors, f"{part}.{one.whole}", one.place))
        self._steps_done = steps_done
        self.forget()
        self._sharded.give_up_gathered()
