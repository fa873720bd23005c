"""Text that ends before a stop string: nothing of one is ever let out, and nothing is held long."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jamba_lm.errors import InputError
from jamba_lm.text.stopping import StoppingText, overlap


class Spoken:
    """A stream whose tokens are pieces of a text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return ""


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["ab", "b"], stops=["b", "abb"])
def test_nothing_of_a_stop_string_is_ever_let_out(pieces: list[str], stops: list[str]):
    whole = "".join(pieces)
    text = StoppingText(Spoken(pieces), stops)
    shown = ""
    for token in range(len(pieces)):
        shown += text.push(token)
        read = "".join(pieces[: token + 1])
        ends = [read.find(stop) for stop in stops if stop in read]
        if ends:
            assert text.stopped
            assert shown == read[: min(ends)]
            break
        # All of the text but what a stop string may yet begin with, and no less.
        held = max((overlap(read, stop) for stop in stops), default=0)
        assert shown == read[: len(read) - held]
    if text.stopped:
        # What would have come later, were it the beginning of a longer stop string, comes no more.
        assert text.flush() == ""
    else:
        assert shown + text.flush() == whole
    assert text.push(0) == "" if pieces and text.stopped else True


@pytest.mark.parametrize("stop", ["", None, 3])
def test_a_stop_string_must_hold_something(stop):
    with pytest.raises(InputError, match="stop string"):
        StoppingText(Spoken([]), [stop])
