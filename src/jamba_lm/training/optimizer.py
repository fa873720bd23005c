"""AdamW on float32 master weights, whatever type the model computes in.

Knows parameters by name, and neither data nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from jamba_lm.errors import CheckpointError
from jamba_lm.model.decoder import Decoder
from jamba_lm.training.recipe import OptimizerSection, ScheduleSection

# What a training checkpoint calls the three float32 values that it keeps for each parameter.
PARTS = ("master", "first_moment", "second_moment")


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether weight decay pulls this parameter towards zero: matrices only.

    Not norms and biases; not A_log and D (`log_decay_CN`, `skip_C`), whose zero is no neutral
    value; not the embedding, whose rare rows would shrink between the few times they are seen.

    Source: state-spaces/mamba `mamba_simple.py` (`_no_weight_decay` on A_log and D).
    """
    leaf = name.rpartition(".")[2]
    return parameter.ndim == 2 and leaf in ("weight", "conv_CW") and name != "embedding.weight"


def learning_rate_at(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Return the learning rate of the step with this number, counted from 0.

    Warm-up is linear and ends at `peak`. "cosine" then falls to `final_fraction` of the peak along
    half a cosine. "warmup-stable-decay" stays at the peak and falls along a straight line in the
    last `decay_steps`; it lets a run be made longer or shorter after it has started.

    Source: Loshchilov and Hutter, SGDR (arXiv 1608.03983), eq. 5; MiniCPM (arXiv 2404.06395), §4.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        share = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
        left = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    else:
        left = min(1.0, (steps - step) / max(schedule.decay_steps, 1))
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * left)


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    first: int
    end: int
    shape: torch.Size


class MasterAdamW:
    """AdamW whose weights, gradients and moments are float32, in one long vector each.

    The model's own parameters are rounded copies of the master weights: in bfloat16 a step of
    training is often smaller than the gap to the next number, and would be lost. One vector instead
    of hundreds of tensors makes a step of a small model several times faster.
    """

    def __init__(self, decoder: Decoder, settings: OptimizerSection) -> None:
        """Take the values of `decoder` as the first master weights.

        Args:
            decoder: its parameters are overwritten after every step.
            settings: the recipe's optimizer section.
        """
        self._clip_norm = settings.clip_norm
        named = list(decoder.named_parameters())
        # Decaying parameters first: the two groups of the optimizer are two ranges.
        named.sort(key=lambda item: not decays(*item))
        self._copies = [[parameter for _, parameter in named]]
        ends = list(accumulate(parameter.numel() for _, parameter in named))
        self._slices = [
            _Slice(name, end - parameter.numel(), end, parameter.shape)
            for (name, parameter), end in zip(named, ends, strict=True)
        ]
        border = sum(parameter.numel() for name, parameter in named if decays(name, parameter))
        self._master = torch.cat([parameter.detach().float().flatten() for _, parameter in named])
        self._gradient = torch.zeros_like(self._master)
        self._first = torch.zeros_like(self._master)
        self._second = torch.zeros_like(self._master)
        self._gradients = [
            self._gradient[one.first : one.end].view(one.shape) for one in self._slices
        ]
        self._groups = []
        for first, end, decay in (
            (0, border, settings.weight_decay),
            (border, len(self._master), 0.0),
        ):
            if first == end:
                continue
            vector = torch.nn.Parameter(self._master[first:end])
            vector.grad = self._gradient[first:end]
            self._groups.append((vector, first, end, decay))
        self._adamw = torch.optim.AdamW(
            [{"params": [vector], "weight_decay": decay} for vector, _, _, decay in self._groups],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self._set_state(0)

    def _set_state(self, steps_done: int) -> None:
        for vector, first, end, _ in self._groups:
            self._adamw.state[vector] = {
                "step": torch.tensor(float(steps_done)),
                "exp_avg": self._first[first:end],
                "exp_avg_sq": self._second[first:end],
            }

    def add_copy(self, decoder: Decoder) -> None:
        """Keep another decoder at the same weights; its gradients are collected by its number."""
        self._copies.append([decoder.get_parameter(one.name) for one in self._slices])

    def collect(self, copy: int = 0) -> None:
        """Add the gradients of a decoder's parameters to the float32 sum, and clear them.

        Args:
            copy: 0 for the first decoder, 1 for the first that was added.
        """
        for parameter, sum_of in zip(self._copies[copy], self._gradients, strict=True):
            # An expert that no row was sent to has none.
            if parameter.grad is not None:
                sum_of.add_(parameter.grad)
                parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Take one step along the collected gradients and round the new weights into the model.

        Returns:
            The norm of the gradient before it was clipped. When it is not finite, nothing was
            changed.
        """
        norm = self._gradient.norm().item()
        if not math.isfinite(norm):
            return norm
        if norm > self._clip_norm:
            self._gradient.mul_(self._clip_norm / norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._gradient.zero_()
        self._write_back()
        return norm

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameters in self._copies:
                for parameter, one in zip(parameters, self._slices, strict=True):
                    parameter.copy_(self._master[one.first : one.end].view(one.shape))

    def masters(self) -> dict[str, Tensor]:
        """Return the float32 weights by name: views, not copies."""
        return {one.name: self._master[one.first : one.end].view(one.shape) for one in self._slices}

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must be kept to go on exactly, by `part.parameter`: views."""
        vectors = dict(zip(PARTS, (self._master, self._first, self._second), strict=True))
        return {
            f"{part}.{one.name}": vector[one.first : one.end].view(one.shape)
            for part, vector in vectors.items()
            for one in self._slices
        }

    def restore(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Take back what `tensors` returned, and round the weights into the model.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not float32.
        """
        own = self.tensors()
        differing = sorted(own.keys() ^ tensors.keys())
        differing += sorted(
            name
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape or tensors[name].dtype != torch.float32
        )
        if differing:
            raise CheckpointError(
                f"the training checkpoint does not fit the model of the recipe: {len(differing)} "
                f"tensors differ, the first is {differing[0]!r}; use the recipe it was made with"
            )
        for name, value in tensors.items():
            own[name].copy_(value)
        self._set_state(steps_done)
        self._write_back()
