"""The rules that pick the next token from logits: penalties, filters, one draw.

Knows one sequence at a time and neither model nor text; a batch of sequences is a batch of
samplers, so that no sequence can change what another one says. Computes in numpy, which is
several times faster than torch on single rows.

V is the vocabulary, J the tokens that may still be picked.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jamba_lm.config_json import shown
from jamba_lm.errors import InputError, JambaError

if TYPE_CHECKING:
    from torch import Tensor

SEED_LIMIT = 2**63
# A softmax at a lower temperature cannot be told from an argmax in float32.
LOWEST_TEMPERATURE = 1e-3
HIGHEST_TEMPERATURE = 100.0
NUM_DRAW_BITS = 53
# The draw first finds the block of this many tokens, then the token in it.
CDF_BLOCK = 256
# Columns in which the largest values are looked for, for each that is wanted.
TOP_K_WIDTH = 8

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are picked. The default is greedy: always the most likely one.

    The steps, in this order; each is skipped at the value in brackets:

    1. `repetition_penalty` [1]: logits of tokens in the prompt or the answer are divided by it
       when positive and multiplied by it when negative.
    2. `frequency_penalty` [0] times the number of times the answer already holds a token, and
       `presence_penalty` [0] if it holds it at all, are taken from its logit.
    3. `temperature`: logits are divided by it. At 0 the largest logit wins and the steps below
       have nothing to decide.
    4. `top_k` [None]: only the k largest logits stay (all that tie with the k-th).
    5. `top_p` [1]: only the most likely tokens stay, as few as together reach this probability.
    6. `min_p` [0]: only tokens at least this fraction as likely as the likeliest stay.
    7. One draw from the softmax of what stays.

    Steps 1 and 3 to 6 are the logits processors of transformers in the order of its `generate`; 2
    is that of the OpenAI interface.

    Attributes:
        temperature: 0, or 0.001 to 100.
        top_k: at least 1.
        top_p: above 0, at most 1.
        min_p: 0 to 1.
        repetition_penalty: above 0, at most 100; over 1 discourages repetition.
        presence_penalty: -2 to 2, in logits.
        frequency_penalty: -2 to 2, in logits a repetition.
        seed: the draw for the i-th token depends on this and i alone; None takes a fresh seed,
            which `Sampler.seed` tells.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InputError: a value is out of its range.
        """
        if self.temperature != 0:
            _require_range("temperature", self.temperature, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        _require_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.top_k is not None:
            _require_whole("top_k", self.top_k, 1, None)
        if self.seed is not None:
            _require_whole("seed", self.seed, 0, SEED_LIMIT - 1)


def _require_range(
    name: str, value: float, lowest: float, highest: float, *, above: bool = False
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not lowest <= value <= highest or (above and value == lowest):
        zero = "0 (greedy) or " if name == "temperature" else ""
        raise InputError(
            f"{name} is {shown(value)}: expected {zero}a number {'above' if above else 'from'} "
            f"{lowest:g} {'and at most' if above else 'to'} {highest:g}"
        )


def _require_whole(name: str, value: int, lowest: int, highest: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):
        limit = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        hint = "; leave it out to keep every token" if name == "top_k" else ""
        raise InputError(f"{name} is {shown(value)}: expected a whole number {limit}{hint}")


def fresh_seed() -> int:
    """Return a seed that nobody has used."""
    return secrets.randbelow(SEED_LIMIT)


class Sampler:
    """Picks the tokens of one sequence, and remembers those it has picked.

    Attributes:
        seed: the seed in use; give it to `Sampling` to get the same tokens again.
        num_picked: tokens picked so far, which is the index of the next draw.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, prompt_ids: Sequence[int] = ()) -> None:
        """Start a sequence that has read `prompt_ids` (used by the repetition penalty)."""
        self.seed = fresh_seed() if sampling.seed is None else sampling.seed
        self.num_picked = 0
        self._sampling = sampling
        self._read_V: NDArray[np.bool_] | None = None
        self._times_picked: dict[int, int] = {}
        if sampling.repetition_penalty != 1:
            self._read_V = np.zeros(vocab_size, dtype=np.bool_)
            self._read_V[np.asarray(prompt_ids, dtype=np.int64)] = True
        # A fresh array of this size costs more in page faults than the arithmetic on it.
        self._scaled_V = np.empty(vocab_size, dtype=np.float32)

    def pick(self, logits_V: Tensor | Floats) -> int:
        """Pick the next token.

        Args:
            logits_V: float32; not changed.

        Raises:
            JambaError: the logits are not numbers.
        """
        row_V, likeliest = self._penalized(logits_V)
        if self._sampling.temperature == 0:
            token = likeliest
        else:
            ids_J, weight_J = self._candidates(row_V, likeliest)
            place = inverse_cdf(weight_J, uniform(self.seed, self.num_picked))
            token = int(ids_J[place])
        self.num_picked += 1
        if self._read_V is not None:
            self._read_V[token] = True
        self._times_picked[token] = self._times_picked.get(token, 0) + 1
        return token

    def candidates(self, logits_V: Tensor | Floats) -> tuple[Ids, Floats]:
        """Return the tokens that the next draw may give, and their weights: steps 1 to 6.

        Returns:
            Ids in ascending order, and positive weights that are proportional to probabilities.

        Raises:
            JambaError: the logits are not numbers.
        """
        row_V, likeliest = self._penalized(logits_V)
        if self._sampling.temperature == 0:
            return np.array([likeliest], dtype=np.int64), np.ones(1, dtype=np.float32)
        return self._candidates(row_V, likeliest)

    def _penalized(self, logits_V: Tensor | Floats) -> tuple[Floats, int]:
        """Return the logits after steps 1 and 2, and the place of the largest."""
        sampling = self._sampling
        row_V = logits_V if isinstance(logits_V, np.ndarray) else logits_V.numpy(force=True)
        # The place of a NaN, if there is one.
        likeliest = int(row_V.argmax())
        if not math.isfinite(largest := row_V.item(likeliest)):
            raise JambaError(
                f"the model's logits are not numbers (the largest is {largest}): its weights are "
                "damaged or overflow in this type; try fp32"
            )
        unchanged = row_V
        if self._read_V is not None:
            row_V = penalize_repetition(row_V, self._read_V, sampling.repetition_penalty)
        if self._times_picked and (sampling.frequency_penalty or sampling.presence_penalty):
            row_V = row_V.copy()
            for token, times in self._times_picked.items():
                row_V[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
        return row_V, likeliest if row_V is unchanged else int(row_V.argmax())

    def _candidates(self, row_V: Floats, likeliest: int) -> tuple[Ids, Floats]:
        sampling = self._sampling
        # The largest becomes zero first, so that a low temperature cannot overflow.
        scaled_V = np.subtract(row_V, row_V[likeliest], out=self._scaled_V)
        if sampling.temperature != 1:
            scaled_V /= np.float32(sampling.temperature)
        if sampling.top_k is not None and sampling.top_k < len(scaled_V):
            ids_J = largest(scaled_V, sampling.top_k)
            weight_J = np.exp(scaled_V[ids_J])
        else:
            ids_J = np.arange(len(scaled_V))
            weight_J = np.exp(scaled_V, out=scaled_V)
        if sampling.top_p < 1:
            kept = most_likely(weight_J, sampling.top_p)
            ids_J, weight_J = ids_J[kept], weight_J[kept]
        if sampling.min_p > 0:
            # The largest weight is 1: it belongs to the logit that was made zero.
            kept = np.flatnonzero(weight_J >= sampling.min_p)
            ids_J, weight_J = ids_J[kept], weight_J[kept]
        return ids_J, weight_J


def penalize_repetition(row_V: Floats, read_V: NDArray[np.bool_], penalty: float) -> Floats:
    """Make the tokens of `read_V` less likely (more likely when `penalty` is under 1).

    Paper: CTRL (arXiv 1909.05858) §4.1; the sign rule is that of transformers.
    """
    penalized_V = row_V.copy()
    read = row_V[read_V]
    penalized_V[read_V] = np.where(read < 0, read * penalty, read / penalty)
    return penalized_V


def largest(values: Floats, count: int) -> Ids:
    """Return the places of the `count` largest, and of all that tie with the last, ascending."""
    width = TOP_K_WIDTH * count
    if width > len(values) // 2:
        return np.flatnonzero(values >= np.partition(values, -count)[-count])
    # The largest of `width` columns are different values, so the `count` largest of them bound what
    # is looked for from below, and few values are above that bound.
    rows = len(values) // width
    heads = values[: rows * width].reshape(rows, width).max(axis=0)
    some = np.flatnonzero(values >= np.partition(heads, -count)[-count])
    chosen = values[some]
    return some[chosen >= np.partition(chosen, -count)[-count]]


def most_likely(weight_J: Floats, top_p: float) -> Ids:
    """Return the places of the fewest largest weights that make up `top_p` of all, ascending.

    Of weights that tie, those that come first are taken.

    Paper: nucleus sampling (arXiv 1904.09751) §3.1.
    """
    total = float(weight_J.sum(dtype=np.float64))
    # Sorting a whole vocabulary is slow. Weights under this bound make up 1 - top_p only all
    # together, so none of them is ever among those kept.
    some = np.flatnonzero(weight_J >= (1 - top_p) * total / len(weight_J))
    weight_some = weight_J[some]
    # Values are sorted many times faster than places.
    ordered = np.sort(weight_some)[::-1].astype(np.float64)
    before = ordered.cumsum() - ordered
    num_kept = max(1, int(np.count_nonzero(before < top_p * total)))
    kept = weight_some > ordered[num_kept - 1]
    ties = np.flatnonzero(weight_some == ordered[num_kept - 1])
    kept[ties[: num_kept - np.count_nonzero(kept)]] = True
    return some[np.flatnonzero(kept)]


def uniform(seed: int, index: int) -> float:
    """Return the `index`-th number in [0, 1) of the stream that `seed` names.

    A hash of the two and not a generator with a memory: whatever else is generated at the same
    time, and wherever a sequence is resumed, its draws are the same.
    """
    digest = blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - NUM_DRAW_BITS)) / 2**NUM_DRAW_BITS


def inverse_cdf(weight_J: Floats, u: float) -> int:
    """Return the place at which the cumulative weight passes the fraction `u` of all of it.

    Args:
        weight_J: not negative, and not all zero.
        u: 0 <= u < 1.
    """
    starts = np.arange(0, len(weight_J), CDF_BLOCK)
    passed = np.add.reduceat(weight_J, starts, dtype=np.float64).cumsum()
    target = u * float(passed[-1])
    block = _first_past(passed, target)
    if block:
        target -= float(passed[block - 1])
    start = int(starts[block])
    return start + _first_past(weight_J[start : start + CDF_BLOCK].cumsum(dtype=np.float64), target)


def _first_past(cumulative: NDArray[np.float64], target: float) -> int:
    # side="right" passes over weights of zero, whose entry equals the one before.
    place = int(np.searchsorted(cumulative, target, side="right"))
    if place < len(cumulative):
        return place
    # Rounding has put the target at the very end: then it is the last weight that is not zero.
    return int(np.count_nonzero(cumulative < cumulative[-1]))


def log_probabilities(logits_V: Tensor | Floats, picked: int, num_top: int) -> LogProbabilities:
    """Return what the model itself thought, before any of the steps, in natural logarithms.

    Args:
        logits_V: float32.
        picked: the token whose log-probability is wanted.
        num_top: how many of the most likely tokens to list as well.
    """
    row_V = logits_V if isinstance(logits_V, np.ndarray) else logits_V.numpy(force=True)
    largest = float(row_V.max())
    log_total = largest + math.log(float(np.exp(row_V - largest).sum(dtype=np.float64)))
    num_top = min(num_top, len(row_V))
    top: list[int] = []
    if num_top:
        some = np.argpartition(row_V, -num_top)[-num_top:]
        top = some[np.lexsort((some, -row_V[some]))].tolist()
    return LogProbabilities(
        picked=float(row_V[picked]) - log_total,
        top=tuple((token, float(row_V[token]) - log_total) for token in top),
    )


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Natural logarithms of the model's own probabilities at one place.

    Attributes:
        picked: that of the token that was picked.
        top: the most likely tokens with theirs, likeliest first.
    """

    picked: float
    top: tuple[tuple[int, float], ...]
