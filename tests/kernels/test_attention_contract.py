"""What every back-end owes for attention: the textbook, without its T x S memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels import fused_attention, reference
from tests.kernels.scan_cases import DTYPES, offsets_of
from tests.tolerances import ATTENTION, assert_within

RUNNERS = {"reference": reference.attention, "native": fused_attention.attention}
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """Sequences of `tokens` new and `past` remembered positions, in blocks."""

    tokens: tuple[int, ...]
    past: tuple[int, ...]
    heads: int = 4
    groups: int = 2
    width: int = 8


CASES = [
    Case((1,), (0,)),
    Case((1,), (40,)),
    Case((33,), (0,)),
    Case((7,), (50,)),
    Case((1, 1, 1), (5, 0, 300)),
    Case((5, 1, 64), (0, 9, 3), heads=6, groups=1),
    Case((3, 2), (1, 0), heads=4, groups=4),
    Case((2, 9), (8, 2), heads=12, groups=3, width=16),
]


def blocks(sizes: list[int], case: Case, narrow: torch.dtype) -> list[Tensor]:
    return [torch.randn(size, case.groups, case.width).to(narrow) for size in sizes if size]


def draw(case: Case, dtype: str) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]], Tensor]:
    """Return queries, keys, values and offsets; the past lies in two blocks, the new in one."""
    narrow = DTYPES[dtype]
    q = torch.randn(sum(case.tokens), case.heads, case.width).to(narrow)
    sizes = [
        [past // 3, past - past // 3, tokens]
        for tokens, past in zip(case.tokens, case.past, strict=True)
    ]
    keys = [blocks(size, case, narrow) for size in sizes]
    values = [blocks(size, case, narrow) for size in sizes]
    return q, keys, values, offsets_of(case.tokens)


def written_out(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """Compute one sequence query by query and head by head, in float64."""
    share = q.shape[1] // k.shape[1]
    y = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen_k = k[: past + t + 1, head // share].double()
            weights = (seen_k @ q[t, head].double() * SCALE).softmax(0)
            y[t, head] = weights @ v[: past + t + 1, head // share].double()
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_values_are_those_of_the_textbook(runner: str, case: Case, dtype: str):
    q, keys, values, offsets = draw(case, dtype)
    found = RUNNERS[runner](q, keys, values, offsets, SCALE)
    assert found.dtype == q.dtype
    start = 0
    for b, tokens in enumerate(case.tokens):
        expected = written_out(
            q[start : start + tokens], torch.cat(keys[b]), torch.cat(values[b]), case.past[b]
        )
        assert_within(found[start : start + tokens], expected, ATTENTION[dtype])
        start += tokens


@pytest.fixture(params=[1, 7], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_are_those_of_the_definition(runner: str, case: Case, threads: int):
    """However many threads there are keys for, also where they do not come out even."""
    q, keys, values, offsets = draw(case, "fp32")
    slope = torch.randn(q.shape)

    def gradients(name: str, dtype: torch.dtype) -> list[Tensor]:
        def leaf(x: Tensor) -> Tensor:
            return x.to(dtype).clone().requires_grad_()

        leaves = (
            leaf(q),
            [[leaf(x) for x in k] for k in keys],
            [[leaf(x) for x in v] for v in values],
        )
        y = RUNNERS[name](*leaves, offsets, SCALE)
        flat = [leaves[0], *(x for part in leaves[1:] for sequence in part for x in sequence)]
        return list(torch.autograd.grad(y, flat, slope.to(dtype)))

    found = gradients(runner, torch.float32)
    for x, expected in zip(found, gradients("reference", torch.float64), strict=True):
        # The only position of a sequence has weight one, whatever its key: no slope at all.
        if float(expected.abs().max()) > 0:
            assert_within(x, expected, ATTENTION["gradient"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_long_queries_are_cut_into_blocks_without_a_seam(runner: str, monkeypatch):
    case = Case((50,), (30,))
    q, keys, values, offsets = draw(case, "fp32")
    whole = RUNNERS[runner](q, keys, values, offsets, SCALE)
    monkeypatch.setattr(reference, "SCORES", 4 * 80 * 7)
    monkeypatch.setattr(fused_attention, "MASK_VALUES", 80 * 7)
    assert_within(RUNNERS[runner](q, keys, values, offsets, SCALE), whole, ATTENTION["fp32"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_future_and_the_neighbours_are_not_seen(runner: str):
    case = Case((6, 20, 5), (4, 0, 7))
    q, keys, values, offsets = draw(case, "fp32")
    clean = RUNNERS[runner](q, keys, values, offsets, SCALE)
    for part in (keys, values):
        part[1][-1][12:] = torch.randn(8, case.groups, case.width)
    found = RUNNERS[runner](q, keys, values, offsets, SCALE)
    same = (found == clean).flatten(1).all(1)
    assert same.tolist() == [row not in range(18, 26) for row in range(31)]


@pytest.mark.parametrize("runner", RUNNERS)
def test_inputs_are_left_alone_and_strides_do_not_matter(runner: str):
    case = Case((6, 1), (4, 7))
    q, keys, values, offsets = draw(case, "fp32")
    expected = RUNNERS[runner](q, keys, values, offsets, SCALE)
    wide = torch.randn(7, 3, 4, 8)
    wide[:, 1] = q
    strided = [[x.transpose(0, 1).contiguous().transpose(0, 1) for x in k] for k in keys]
    before = [x.clone() for k in strided for x in k]
    found = RUNNERS[runner](wide[:, 1], strided, values, offsets, SCALE)
    assert_within(found, expected, ATTENTION["fp32"])
    assert found.is_contiguous()
    assert torch.equal(wide[:, 1], q)
    for x, y in zip((x for k in strided for x in k), before, strict=True):
        assert torch.equal(x, y)


@given(
    tokens=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    past=st.integers(0, 20),
    groups=st.integers(1, 3),
    share=st.integers(1, 4),
    runner=st.sampled_from(sorted(RUNNERS)),
)
@settings(max_examples=40)
def test_any_shape_will_do(tokens, past, groups, share, runner):
    case = Case(tuple(tokens), tuple([past] * len(tokens)), groups * share, groups, 4)
    q, keys, values, offsets = draw(case, "fp32")
    found = RUNNERS[runner](q, keys, values, offsets, SCALE)
    start = 0
    for b, count in enumerate(tokens):
        k, v = torch.cat(keys[b]), torch.cat(values[b])
        expected = written_out(q[start : start + count], k, v, past)
        assert_within(found[start : start + count], expected, ATTENTION["fp32"])
        start += count
