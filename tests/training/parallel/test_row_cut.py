"""How the rows of packed documents are cut between context processes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import DataError
from jamba_lm.training.parallel.row_cut import ContextBatch, RowCut

DOCUMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@given(lengths=DOCUMENTS, size=st.integers(1, 9))
def test_every_row_is_held_once_and_knows_where_its_document_began(lengths, size):
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    positions = [place for length in lengths for place in range(length)]
    rows = len(owners)
    if rows < size:
        return
    found, crossed = [], False
    for rank in range(size):
        cut = RowCut.of(lengths, size, rank)
        batch = ContextBatch.piece(cut)
        assert cut.first == len(found)
        assert rows // size <= batch.num_rows <= cut.longest == -(-rows // size)
        for piece, (first, end) in enumerate(batch.spans()):
            held = owners[cut.first + first : cut.first + end]
            assert len(set(held)) == 1
            if piece:
                assert held[0] == owners[cut.first + first - 1] + 1
        found += batch.positions().tolist()
        begin = cut.first - cut.before
        assert owners[begin : cut.first].count(owners[cut.first]) == cut.before
        assert begin == 0 or owners[begin - 1] != owners[cut.first]
        crossed |= cut.before > 0
        holders = [
            other
            for other in range(rank)
            if RowCut.of(lengths, size, other).end > begin and cut.before
        ]
        assert list(cut.holders()) == holders
    assert found == positions
    assert all(RowCut.of(lengths, size, rank).crosses == crossed for rank in range(size))


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(DataError, match=re.escape("a batch of 3 tokens cannot be cut for")):
        RowCut.of([1, 2], 4, 0)
