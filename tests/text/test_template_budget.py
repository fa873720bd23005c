"""What a template makes is measured as large as it would be when written out."""

from __future__ import annotations

from itertools import pairwise

import hypothesis
import hypothesis.strategies as st
import pytest

from jamba_lm.text.template_budget import (
    DEPTH_LIMIT,
    SIZE_FLOOR,
    STEP_LIMIT,
    BoundExceeded,
    Budget,
)

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=5), inner)),
    max_leaves=20,
)


@hypothesis.given(value=VALUES)
def test_no_value_is_written_longer_than_a_few_times_its_size(value):
    """Quotes, commas and escapes make a text longer, by a factor that is bounded."""
    assert len(str(value)) <= 16 * Budget().size(value)


def test_an_element_that_occurs_twice_counts_twice():
    budget = Budget(size_limit=2**62)
    value: list = ["a"]
    sizes = []
    for _ in range(30):
        value = [value, value]
        sizes.append(budget.size(value))
    assert all(after > 2 * before for before, after in pairwise(sizes))
    assert sizes[-1] > 2**30


def test_each_bound_ends_a_run():
    with pytest.raises(BoundExceeded, match="steps"):
        Budget().spend(STEP_LIMIT + 1)
    with pytest.raises(BoundExceeded, match=r"more than 5 s"):
        Budget(deadline=0.0).spend()
    with pytest.raises(BoundExceeded, match="characters"):
        Budget().measured("a" * (SIZE_FLOOR + 1))
    nest: list = []
    for _ in range(DEPTH_LIMIT + 1):
        nest = [nest]
    with pytest.raises(BoundExceeded, match="deep"):
        Budget().measured(nest)


def test_large_values_that_went_in_may_come_out():
    budget = Budget()
    budget.take_in(["a" * (2 * SIZE_FLOOR)])
    assert budget.measured("b" * (4 * SIZE_FLOOR))
