"""What every call of a model checks about the sequences that it is given. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from jamba_lm.errors import InputError


def require_sequences(lengths: Sequence[int], states: Sequence[object] | None) -> None:
    """Check how many sequences there are, and that each has tokens and a state of its own.

    Args:
        lengths: tokens of each sequence.
        states: of the sequences, or None when they have none.

    Raises:
        InputError: no sequence, an empty one, another number of states than of sequences, or the
            same state twice.
    """
    if not lengths:
        raise InputError("no sequences given: expected at least one, of at least one token")
    if min(lengths) < 1:
        raise InputError(
            f"sequence {lengths.index(min(lengths))} is empty: "
            "expected at least one token in every sequence"
        )
    if states is None:
        return
    if len(states) != len(lengths):
        raise InputError(
            f"{len(states)} states given for {len(lengths)} sequences: expected one each"
        )
    if len({id(state) for state in states}) != len(states):
        raise InputError(
            "the same state was given for two sequences: fork() it, so that each moves on its own"
        )


def require_ids(ids_M: Sequence[int], vocab_size: int) -> None:
    """Check that every id is one of a vocabulary.

    Raises:
        InputError: one is no integer, or out of range.
    """
    for one in ids_M:
        try:
            token = operator.index(one)
        except TypeError as error:
            raise InputError(
                f"token ids must be integers ({error}): expected a list of lists of ids"
            ) from error
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {one} is out of range: "
                f"expected 0..{vocab_size - 1}; is this the model's tokenizer?"
            )
