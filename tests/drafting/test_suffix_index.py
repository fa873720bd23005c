"""The index finds where the last tokens stood before, as a search through everything would."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.drafting.suffix_index import (
    LONG,
    LONGEST_MEASURED,
    PLACES_TRIED,
    SHORT,
    Match,
    SuffixIndex,
)

TEXTS = st.lists(st.integers(0, 3), max_size=40) | st.lists(st.integers(0, 10**5), max_size=40)


def agreeing(ids: list[int], place: int) -> int:
    """Count the tokens before `place` that agree with the last ones of `ids`."""
    length = 0
    while length < place and ids[place - 1 - length] == ids[-1 - length]:
        length += 1
    return length


def occurrences(ids: list[int], order: int) -> list[int]:
    """List the places behind each earlier occurrence of the last `order` tokens, latest first."""
    return [place for place in range(len(ids) - 1, 0, -1) if agreeing(ids, place) >= order]


def longest(ids: list[int]) -> Match | None:
    """Search everything: the longest match, of equal ones the latest."""
    found = [Match(place, agreeing(ids, place)) for place in occurrences(ids, SHORT)]
    return max(found, key=lambda match: (match.length, match.start), default=None)


@given(TEXTS)
def test_the_longest_match_is_found_where_the_places_are_few(ids: list[int]):
    index = SuffixIndex(ids)
    if len(occurrences(ids, SHORT)) <= PLACES_TRIED:
        found = index.find()
        assert found == longest(ids)


@given(TEXTS)
def test_asking_after_every_token_changes_nothing(ids: list[int]):
    """A match that goes on is not looked for again, and must be the one that would be found."""
    asked = SuffixIndex()
    for place, token in enumerate(ids):
        asked.append(token)
        found = asked.find()
        if len(occurrences(ids[: place + 1], SHORT)) <= PLACES_TRIED:
            assert found == longest(ids[: place + 1])


@given(TEXTS)
def test_what_is_found_did_stand_there(ids: list[int]):
    found = SuffixIndex(ids).find()
    if found is None:
        assert not occurrences(ids, SHORT)
    else:
        assert SHORT <= found.length <= agreeing(ids, found.start)


def test_a_long_match_is_found_behind_any_number_of_short_ones():
    passage = list(range(100, 100 + LONG))
    ids = [*passage, 7, *([1, 103, 104, 2] * 1000), *passage]
    assert SuffixIndex(ids).find() == Match(LONG, LONG)


def test_of_equal_matches_the_latest_is_taken():
    ids = [1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3]
    index = SuffixIndex(ids)
    match = index.find()
    assert match == Match(7, 3)
    assert index.following(match, 2) == [60, 1]


def test_a_match_grows_beyond_what_is_measured_at_once():
    passage = random.Random(0).choices(range(1000), k=100)
    index = SuffixIndex([*passage, 5000, *passage[:60]])
    assert index.find() == Match(60, LONGEST_MEASURED)
    for token in passage[60:80]:
        index.append(token)
    assert index.find() == Match(80, LONGEST_MEASURED + 20)


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_repetition_is_expected_to_go_on(period: int):
    unit = list(range(10, 10 + period))
    index = SuffixIndex(unit * 12)
    assert index.following(index.find(), 20) == (unit * 20)[:20]


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=200), window=st.sampled_from([8, 16]))
def test_a_window_is_all_that_is_remembered(ids: list[int], window: int):
    asked, fresh = SuffixIndex(window=window), SuffixIndex(ids, window=window)
    for token in ids:
        asked.append(token)
        asked.find()
    for index in (asked, fresh):
        assert len(index._ids) <= window
        assert len(index._short.before) <= window
        match = index.find()
        if match is not None:
            assert len(ids) - window < match.start < len(ids)
            assert index[match.start - 1] == ids[-1]
            assert index.following(match, 1) == [ids[match.start]]


def test_nothing_is_found_in_nothing():
    assert SuffixIndex().find() is None
    assert SuffixIndex([3]).find() is None
    assert SuffixIndex([3, 4, 5]).find() is None
