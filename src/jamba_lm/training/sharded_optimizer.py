"""AdamW on parameters that are spread over processes.

Knows parameters by name and where they lie, and neither data nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from jamba_lm.training.checkpointing import check_fit
from jamba_lm.training.optimizer import PARTS, decays, whole_norm
from jamba_lm.training.places import Place
from jamba_lm.training.processes import Processes
from jamba_lm.training.recipe import OptimizerSection
from jamba_lm.training.sharded_files import part_of
from jamba_lm.training.sharding import ShardedDecoder, flat


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

    def collect(self, count: int = 1) -> None:
        """Do nothing: gradients are added up where they arise."""

    def forget(self) -> None:
        """Throw away the gradients of the step that is now not taken."""
        for one in self._parameters:
            one.parameter.grad = None

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the gradient of each parameter, by its name.

        To be called once, after the last pass of a step, by all processes.
        """
        self._add_up_own()
        squares = torch.zeros(len(self._parameters), dtype=torch.float64)
        for number, one in enumerate(self._parameters):
            gradient = one.gradient()
            if gradient is not None and gradient.numel():
                norm = torch.linalg.vector_norm(gradient).double().item()
                squares[number] = norm * norm / one.copies
        found = self._processes.add_up(squares).sqrt().tolist()
        return {one.name: norm for one, norm in zip(self._parameters, found, strict=True)}

    def _add_up_own(self) -> None:
        own = [one for one in self._parameters if not one.summed]
        if not own:
            return
        for one in own:
            if one.parameter.grad is None:
                one.parameter.grad = torch.zeros_like(one.parameter)
        gradients = [one.parameter.grad for one in own if one.parameter.grad is not None]
        together = self._processes.add_up(flat(gradients))
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

    def _held(self) -> dict[str, tuple[Place, Tensor, bool]]:
        """Return all that must be kept to go on, by `part.parameter`, as far as it is here."""
        found = {}
        for number, one in enumerate(self._parameters):
            values = (one.local(), self._first[number], self._second[number])
            for part, tensor in zip(PARTS, values, strict=True):
                found[f"{part}.{one.name}"] = (one.place, tensor, one.owned)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return what this process is to save, by `part.parameter`: views."""
        return {
            name: tensor
            for name, (_, tensor, owned) in self._held().items()
            if owned and tensor.numel()
        }

    def places(self) -> dict[str, Place]:
        """Return where everything that is here lies in the whole."""
        return {name: place for name, (place, _, _) in self._held().items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Take this process' part of saved tensors, whichever mesh saved them.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not float32.
        """
        held = self._held()
        check_fit({name: place.shape for name, (place, _, _) in held.items()}, tensors)
        for name, (place, tensor, _) in held.items():
            tensor.copy_(part_of(tensors, name, place))
        self._steps_done = steps_done
        self.forget()
        self._sharded.give_up_gathered()
