"""Forward and backward over rows that are too many to keep: a segment of them at a time.

The gradient is that of an ordinary pass. What is kept is the input of every layer, attention's keys
and values, and the states of the scan and the convolution where segments meet; everything else is
computed again, layer by layer from the last and segment by segment from the right, where the
gradients of states, keys and values go to the segment before. Knows decoders and losses, and
nothing of optimizers and data.

M rows of the pass, S rows of a segment, D model width, G key/value heads, P head width,
L = convolution taps - 1, C Mamba channels, N state size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor, nn

from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.routing import Routing
from jamba_lm.model.state import SequenceState
from jamba_lm.training.balance import Selections, load_of, share_of_balance_loss
from jamba_lm.training.layer_memory import memory_of
from jamba_lm.training.output import losses_of

PassProgress = Callable[[int, int], None]
"""Told how many segments went through a layer, either way, and of how many."""


def nobody(done: int, total: int) -> None:
    """Take the place of a `PassProgress` where nobody waits."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows, and how they lie in their sequences.

    Attributes:
        first: row.
        end: past the last row.
        lengths: rows of each sequence that has some here.
        began: row where the sequence of the first row began: before `first`, if it goes on here.
        goes_on: whether the last sequence has rows in the next segment.
    """

    first: int
    end: int
    lengths: tuple[int, ...]
    began: int
    goes_on: bool

    @property
    def continues(self) -> bool:
        """Whether the first row belongs to a sequence of the segment before."""
        return self.began < self.first


def cut_rows(lengths: Sequence[int], segment_rows: int) -> list[Segment]:
    """Cut the rows of sequences, laid end to end, into segments of `segment_rows`.

    >>> [(one.lengths, one.continues, one.goes_on) for one in cut_rows([3, 4], 4)]
    [((3, 1), False, True), ((3,), True, False)]
    """
    ends = list(accumulate(lengths))
    begins = [0, *ends[:-1]]
    found = []
    for first in range(0, ends[-1], segment_rows):
        end = min(first + segment_rows, ends[-1])
        inside = [
            (begin, stop)
            for begin, stop in zip(begins, ends, strict=True)
            if begin < end and stop > first
        ]
        rows = tuple(min(stop, end) - max(begin, first) for begin, stop in inside)
        found.append(Segment(first, end, rows, inside[0][0], inside[-1][1] > end))
    return found


@dataclass(frozen=True, slots=True)
class SegmentedLosses:
    """The losses of a pass, each without its coefficient, as sums over its rows.

    Attributes:
        entropy: cross entropy, in nats.
        squares: (log sum exp of the logits)^2.
        balance: the balance loss of the pass, a mean; 0 without experts.
        routing: how often each layer's experts were taken, float32 [X] of each mixture.
    """

    entropy: float
    squares: float
    balance: float
    routing: list[Tensor]


class SegmentedPass:
    """Passes of one decoder in segments of a number of rows."""

    def __init__(
        self,
        decoder: Decoder,
        segment_rows: int,
        *,
        truncated: bool = False,
        backend: str | None = None,
        progress: PassProgress = nobody,
    ) -> None:
        """Choose how passes are cut.

        Args:
            decoder: its gradients are added to, as by `backward()`.
            segment_rows: rows of a segment.
            truncated: no gradient crosses a cut. States, keys and values come from the segment
                before as numbers: the gradient is that of each segment's own loss with respect to
                the weights where this segment uses them.
            backend: kernel back-end by name, or None.
            progress: told how far a pass is.
        """
        assert segment_rows > 0
        self._decoder = decoder
        self._segment_rows = segment_rows
        self._truncated = truncated
        self._backend = backend
        self._progress = progress

    def backward(
        self,
        ids_M: Tensor,
        targets_M: Tensor,
        lengths: Sequence[int],
        *,
        entropy_coef: float,
        z_coef: float = 0.0,
        balance_coef: float = 0.0,
    ) -> SegmentedLosses:
        """Add the gradient of the loss of a pass to the decoder's.

        Args:
            ids_M: the sequences, end to end.
            targets_M: what each row predicts; `data.IGNORED` for nothing.
            lengths: rows of each sequence.
            entropy_coef: of the summed cross entropy.
            z_coef: of the squares beside it.
            balance_coef: of the balance loss.
        """
        decoder = self._decoder
        segments = cut_rows(lengths, self._segment_rows)
        places = self._places(ids_M, segments)
        sums = _GradientSums(decoder)
        total, steps = 2 * len(decoder.blocks) * len(segments), count(1)

        def step() -> None:
            self._progress(next(steps), total)

        with torch.no_grad():
            x_MD = decoder.embedding(ids_M)
            layers = []
            for number, block in enumerate(decoder.blocks):
                layer = _Layer(block, number, segments, places, step)
                layers.append(layer)
                x_MD = layer.forward(x_MD, self._batches(segments, places))
        loads = [layer.load for layer in layers if layer.load is not None]
        selections = None
        if loads:
            # A mean over the rows of all mixtures.
            rows = len(ids_M) * len(loads)
            selections = Selections(torch.stack(loads).sum(0), rows)
        entropy, squares, slope_MD = self._ends(
            x_MD, targets_M, segments, entropy_coef, z_coef, sums
        )
        balance = 0.0
        for layer in reversed(layers):
            batches = self._batches(segments, places)
            balance += layer.backward(
                slope_MD, batches, sums, selections, balance_coef, self._truncated
            )
        for one in segments if _is_trained(decoder.embedding) else ():
            rows_S = slice(one.first, one.end)
            decoder.embedding(ids_M[rows_S]).backward(slope_MD[rows_S])
            sums.take(decoder.embedding)
        sums.give_back()
        return SegmentedLosses(entropy, squares, balance, loads)

    def _ends(
        self,
        x_MD: Tensor,
        targets_M: Tensor,
        segments: Sequence[Segment],
        entropy_coef: float,
        z_coef: float,
        sums: _GradientSums,
    ) -> tuple[float, float, Tensor]:
        """Return the summed losses, and their gradient with respect to the last layer's output."""
        decoder = self._decoder
        entropy = squares = 0.0
        slope_MD = torch.empty_like(x_MD)
        for one in segments:
            rows_S = slice(one.first, one.end)
            x_SD = x_MD[rows_S].detach().requires_grad_()
            batch = Batch.of([one.end - one.first], backend=self._backend)
            hidden_SD = decoder.final_norm(x_SD, batch)
            found = losses_of(decoder, hidden_SD, targets_M[rows_S], z_coef)
            (found.total * entropy_coef).backward()
            assert x_SD.grad is not None
            slope_MD[rows_S] = x_SD.grad
            sums.take(decoder)
            entropy += found.entropy.item()
            squares += found.squares.item()
        return entropy, squares, slope_MD

    def _places(self, ids_M: Tensor, segments: Sequence[Segment]) -> list[SequenceState]:
        """Return for each segment a state that has read as much as its first sequence before it.

        Only rotary positions ask for it: layers are handed their memory apart.
        """
        config, dtype = self._decoder.config, self._decoder.final_norm.weight.dtype
        places = []
        place = SequenceState(config, dtype, str)
        for one in segments:
            if not one.continues:
                place = SequenceState(config, dtype, str)
            places.append(place.fork())
            read = one.lengths[-1]
            if len(one.lengths) > 1:
                place = SequenceState(config, dtype, str)
            place.advance(place.layers, ids_M[one.end - read : one.end].tolist())
        return places

    def _batches(self, segments: Sequence[Segment], places: Sequence[SequenceState]) -> list[Batch]:
        config, dtype = self._decoder.config, self._decoder.final_norm.weight.dtype
        return [
            Batch.of(
                one.lengths,
                [place, *(SequenceState(config, dtype, str) for _ in one.lengths[1:])],
                self._backend,
                [],
            )
            for one, place in zip(segments, places, strict=True)
        ]


class _GradientSums:
    """Gradients of many segments, summed in float32 whatever the type of the weights."""

    def __init__(self, decoder: Decoder) -> None:
        self._parameters = list(decoder.parameters())
        self._sums: dict[int, Tensor] = {}
        for one in self._parameters:
            # What is there already was left by an earlier pass.
            if one.grad is not None:
                self._sums[id(one)] = one.grad.float()
                one.grad = None

    def take(self, module: nn.Module) -> None:
        """Add what a segment left in the weights of `module`, and clear it."""
        for one in module.parameters():
            if one.grad is None:
                continue
            known = self._sums.get(id(one))
            if known is None:
                self._sums[id(one)] = one.grad.float()
            else:
                known += one.grad
            one.grad = None

    def give_back(self) -> None:
        """Leave the sums where `backward()` leaves a gradient."""
        for one in self._parameters:
            if id(one) in self._sums:
                one.grad = self._sums.pop(id(one)).to(one.dtype)


class _Layer:
    """One layer of a pass: its input, and its memory where segments meet.

    Attributes:
        load: how often each expert was taken, once it has run forward; None without experts.
    """

    def __init__(
        self,
        block: nn.Module,
        number: int,
        segments: Sequence[Segment],
        places: Sequence[SequenceState],
        step: Callable[[], None],
    ) -> None:
        self._block = block
        self._segments = segments
        self._step = step
        self.load: Tensor | None = None
        self._memory = memory_of(places[0].layers[number], segments[-1].end)

    def forward(self, x_MD: Tensor, batches: Sequence[Batch]) -> Tensor:
        """Run the layer over all segments, from the left, and return its output."""
        self._x_MD = x_MD
        y_MD = torch.empty_like(x_MD)
        for one, batch in zip(self._segments, batches, strict=True):
            states = self._memory.states(one, batch)
            y_MD[one.first : one.end] = self._block(x_MD[one.first : one.end], batch, states)
            self._memory.keep(one, states)
            for routing in _decisions(batch):
                load = load_of(routing)
                self.load = load if self.load is None else self.load + load
            self._step()
        return y_MD

    def backward(
        self,
        slope_MD: Tensor,
        batches: Sequence[Batch],
        sums: _GradientSums,
        selections: Selections | None,
        balance_coef: float,
        truncated: bool,
    ) -> float:
        """Turn the gradient of the output into that of the input, in place, from the right.

        Returns this layer's share of the balance loss.
        """
        balance = 0.0
        for one, batch in reversed(list(zip(self._segments, batches, strict=True))):
            rows_S = slice(one.first, one.end)
            x_SD = self._x_MD[rows_S].detach().requires_grad_()
            leaves, states = self._memory.leaves(one, batch, truncated=truncated)
            y_SD = self._block(x_SD, batch, states)
            pairs = [(y_SD, slope_MD[rows_S])]
            if one.goes_on and not truncated:
                pairs += self._memory.slopes(one, states)
            for share in _balance(_decisions(batch), selections):
                balance += share.item()
                pairs.append((share * balance_coef, torch.ones(())))
            outputs, slopes = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, slopes)
            assert x_SD.grad is not None
            slope_MD[rows_S] = x_SD.grad
            self._memory.take(one, leaves)
            sums.take(self._block)
            self._step()
        # Nobody asks for this layer again.
        del self._x_MD, self._memory
        return balance


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _decisions(batch: Batch) -> Sequence[Routing]:
    """Return what the mixtures of one segment have decided; the pass itself gave it a list."""
    assert batch.routing is None or isinstance(batch.routing, list)
    return batch.routing or ()


def _balance(routing: Sequence[Routing], selections: Selections | None) -> Iterator[Tensor]:
    if routing and selections is not None:
        yield share_of_balance_loss(routing, selections)
