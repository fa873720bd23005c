"""Held-out text gives the same number however many batches are read at one time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from jamba_lm.data import PackedBatch
from jamba_lm.training.validation import validate


def batches(count: int) -> list[PackedBatch]:
    """Return batches whose first id is their number."""
    return [
        PackedBatch(torch.tensor([number, 0]), torch.tensor([0, 0]), [2]) for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_batches_come_in_order_and_all_of_them_count(count: int, at_once: int):
    calls: list[list[int]] = []

    def predict(some: Sequence[PackedBatch]) -> list[tuple[float, int]]:
        calls.append([int(packed.ids_M[0]) for packed in some])
        return [(0.1 * (1 + number), 2) for number in calls[-1]]

    found = validate(iter(batches(count)), predict, num_bytes=10, at_once=at_once)
    assert [number for call in calls for number in call] == list(range(count))
    assert max(map(len, calls)) == min(at_once, count)
    # Added up one after the other, so that not a bit depends on `at_once`.
    nats = 0.0
    for number in range(count):
        nats += 0.1 * (1 + number)
    assert found.loss == nats / (2 * count)
    assert found.bits_per_byte == nats / math.log(2) / 10
    assert found.num_tokens == 2 * count


def test_a_result_that_is_missing_is_noticed():
    with pytest.raises(ValueError, match="longer"):
        validate(iter(batches(2)), lambda some: [(0.5, 2)], num_bytes=10, at_once=2)
