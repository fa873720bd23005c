"""AdamW on float32 master weights, whatever type the model computes in.

Knows parameters by name, and neither data nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from jamba_lm.model.decoder import Decoder
from jamba_lm.training.checkpointing import check_fit
from jamba_lm.training.places import Place
from jamba_lm.training.recipe import OptimizerSection, ScheduleSection

# What a training checkpoint calls the three float32 values that it keeps for each parameter.
PARTS = ("master", "first_moment", "second_moment")

# Values that are taken from their gradients to the rounded weights at one time: weight and both
# moments (3 MiB together) then come from memory once a step, not once an operation, and the sum of
# the gradients (1 MiB) never leaves the cache.
SHARD_VALUES = 1 << 18

Spread = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Returns `work(item)` for each item, in order; may do several at the same time."""


def one_by_one(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Be a `Spread` that uses no other threads."""
    return [work(item) for item in items]


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
    """Where a parameter lies in the long vectors."""

    name: str
    first: int
    end: int
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one parameter, or all of it: values `first` to `end` of its `start`th on."""

    parameter: int
    start: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """Neighbouring pieces that are decayed alike."""

    pieces: tuple[_Piece, ...]
    weight_decay: float

    @property
    def all(self) -> slice:
        return slice(self.pieces[0].first, self.pieces[-1].end)


class MasterAdamW:
    """AdamW whose weights and moments are float32, in one long vector each.

    The model's own parameters are rounded copies of the master weights: in bfloat16 a step of
    training is often smaller than the gap to the next number, and would be lost. The vectors are
    cut into shards that do not depend on who works on them, so that the number of threads changes
    no bit.

    Gradients are added up in float32 too. The last ones of a step stay as the passes left them
    until a shard is at hand: the optimizer only waits for memory, and a vector of sums would be
    written once and read twice. Only passes before the last need one.
    """

    def __init__(self, decoder: Decoder, settings: OptimizerSection) -> None:
        """Take the values of `decoder` as the first master weights.

        Args:
            decoder: its parameters that require a gradient are overwritten after every step; the
                others have no master weights and stay.
            settings: the recipe's optimizer section.
        """
        self._settings = settings
        self._spread: Spread = one_by_one
        named = [one for one in decoder.named_parameters() if one[1].requires_grad]
        # Decaying parameters first, so that few shards end before they are full.
        named.sort(key=lambda item: not decays(*item))
        self._copies = [[parameter for _, parameter in named]]
        ends = list(accumulate(parameter.numel() for _, parameter in named))
        self._slices = [
            _Slice(name, end - parameter.numel(), end, parameter.shape)
            for (name, parameter), end in zip(named, ends, strict=True)
        ]
        self._shards = [
            _Shard(tuple(pieces), decay)
            for decay, wanted in ((settings.weight_decay, True), (0.0, False))
            for pieces in _shards(
                [
                    (number, one)
                    for number, one in enumerate(self._slices)
                    if decays(*named[number]) is wanted
                ]
            )
        ]
        self._master = torch.cat([parameter.detach().float().flatten() for _, parameter in named])
        self._first = torch.zeros_like(self._master)
        self._second = torch.zeros_like(self._master)
        self._steps_done = 0
        # Of all passes but the last ones; made when there are any.
        self._sum = torch.empty(0)
        self._has_sum = False
        # By pass and parameter, flat; an expert that no row was sent to has none.
        self._waiting: list[list[Tensor | None]] = []

    def share_out(self, decoders: Sequence[Decoder], spread: Spread) -> None:
        """Keep more decoders at the same weights, and let `spread` share the work on shards out."""
        self._copies += [
            [decoder.get_parameter(one.name) for one in self._slices] for decoder in decoders
        ]
        self._spread = spread

    @torch.no_grad()
    def collect(self, count: int = 1, *, last: bool = True) -> None:
        """Take the gradients of the first `count` decoders, which are then without.

        They are added up one after the other, so that the sum does not depend on how many decoders
        the passes of a step were shared out over.

        Args:
            count: how many decoders have seen a pass since they were last asked.
            last: no more will follow in this step; if some do, memory is all that is lost.
        """
        self._add_up_waiting()
        for parameters in self._copies[:count]:
            self._waiting.append(
                [None if one.grad is None else one.grad.reshape(-1) for one in parameters]
            )
            for parameter in parameters:
                parameter.grad = None
        if not last:
            self._add_up_waiting()

    def _add_up_waiting(self) -> None:
        """Put what waits into the vector of sums."""
        if not self._waiting:
            return
        if not self._sum.numel():
            self._sum = torch.empty_like(self._master)
        self._spread(lambda shard: self._add_up(shard, self._sum[shard.all]), self._shards)
        self._waiting, self._has_sum = [], True

    def _add_up(self, shard: _Shard, total: Tensor) -> None:
        """Add what waits for a shard to the sum of the passes before."""
        origin = shard.pieces[0].first
        for piece in shard.pieces:
            part = slice(piece.start, piece.start + piece.end - piece.first)
            sum_of, empty = total[piece.first - origin : piece.end - origin], not self._has_sum
            for gradients in self._waiting:
                gradient = gradients[piece.parameter]
                if gradient is None:
                    continue
                if empty:
                    sum_of.copy_(gradient[part])
                else:
                    sum_of.add_(gradient[part])
                empty = False
            if empty:
                sum_of.zero_()

    def _gradient(self, shard: _Shard) -> Tensor:
        """Return the gradient of a shard, in a vector of its own."""
        if self._has_sum:
            gradient = self._sum[shard.all].clone()
        else:
            gradient = torch.empty_like(self._master[shard.all])
        self._add_up(shard, gradient)
        return gradient

    def forget(self) -> None:
        """Throw away what was collected for the step that is now not taken."""
        self._waiting, self._has_sum = [], False

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient collected so far, float32, by the name of the parameter."""
        whole = torch.cat(self._spread(self._gradient, self._shards))
        return {one.name: whole[one.first : one.end].view(one.shape) for one in self._slices}

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the collected gradient of each parameter, by its name."""

        def norms(shard: _Shard) -> list[Tensor]:
            pieces = self._gradient(shard).split([one.end - one.first for one in shard.pieces])
            return [torch.linalg.vector_norm(piece) for piece in pieces]

        squares = [0.0] * len(self._slices)
        for shard, found in zip(self._shards, self._spread(norms, self._shards), strict=True):
            for piece, norm in zip(shard.pieces, torch.stack(found).tolist(), strict=True):
                squares[piece.parameter] += norm * norm
        return {
            one.name: math.sqrt(square) for one, square in zip(self._slices, squares, strict=True)
        }

    @torch.no_grad()
    def step(self, learning_rate: float, norm: float | None = None) -> float:
        """Take one step along the collected gradients and round the new weights into the model.

        Args:
            learning_rate: of this step.
            norm: of the collected gradient, when it is known.

        Returns:
            The norm of the gradient before it was clipped. When it is not finite, nothing was
            changed, and what was collected is forgotten.
        """
        if norm is None:
            norm = whole_norm(self.gradient_norms())
        if not math.isfinite(norm):
            self.forget()
            return norm
        settings = self._settings
        shrink = settings.clip_norm / norm if norm > settings.clip_norm else 1.0

        def move(shard: _Shard) -> None:
            part = shard.all
            gradient = self._gradient(shard)
            if shrink != 1.0:
                gradient.mul_(shrink)
            adamw(
                [self._master[part]],
                [gradient],
                [self._first[part]],
                [self._second[part]],
                [],
                [torch.tensor(float(self._steps_done))],
                fused=True,
                amsgrad=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=learning_rate,
                weight_decay=shard.weight_decay,
                eps=settings.eps,
                maximize=False,
            )
            self._round(shard)

        self._spread(move, self._shards)
        self._steps_done += 1
        self.forget()
        return norm

    def _round(self, shard: _Shard) -> None:
        """Write the master weights of a shard into all copies of the model."""
        for piece in shard.pieces:
            part = slice(piece.start, piece.start + piece.end - piece.first)
            master = self._master[piece.first : piece.end]
            for parameters in self._copies:
                parameters[piece.parameter].data.view(-1)[part].copy_(master)

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

    def places(self) -> dict[str, tuple[str, Place]]:
        """Return nothing: every tensor is whole."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Take back what `tensors` returned, and round the weights into the model.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not float32.
        """
        own = self.tensors()
        check_fit({name: tuple(tensor.shape) for name, tensor in own.items()}, tensors)
        for name, value in tensors.items():
            own[name].copy_(value)
        self._steps_done = steps_done
        self.forget()
        with torch.no_grad():
            self._spread(self._round, self._shards)


def whole_norm(norms: Mapping[str, float]) -> float:
    """Return the norm of all parameters' gradients together."""
    return math.sqrt(math.fsum(norm * norm for norm in norms.values()))


def _shards(slices: Sequence[tuple[int, _Slice]]) -> Iterator[list[_Piece]]:
    """Cut neighbouring parameters into shards of about `SHARD_VALUES` values."""
    pieces: list[_Piece] = []
    held = 0
    for number, one in slices:
        for first in range(one.first, one.end, SHARD_VALUES):
            end = min(first + SHARD_VALUES, one.end)
            pieces.append(_Piece(number, first - one.first, first, end))
            held += end - first
            if held >= SHARD_VALUES:
                yield pieces
                pieces, held = [], 0
    if pieces:
        yield pieces
