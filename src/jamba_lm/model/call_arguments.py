"""What every call of a model checks about the sequences that it is given. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from jamba_lm.config_json import shown
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


def require_ids(ids: Sequence[int], vocab_size: int, name: str = "token id") -> list[int]:
    """Return `ids` as a list of Python's own integers if a model of this vocabulary can read them.

    Args:
        ids: from anywhere, an array or tensor among others.
        vocab_size: ids are below it.
        name: what one of them is called in a message.

    Raises:
        InputError: one is no integer, or out of range.
    """
    checked = []
    for place, given in enumerate(ids):
        try:
            token = operator.index(given)
        except TypeError as error:
            raise InputError(
                f"{name} {place} is {shown(given)}: expected an int; encode text first"
            ) from error
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{name} {place} is {shown(token)}, which is out of range: "
                f"expected 0..{vocab_size - 1}; is this the model's tokenizer?"
            )
        checked.append(token)
    return checked
