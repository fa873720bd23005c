"""Work that is shared out over threads comes back in its order."""

from __future__ import annotations

import threading

import pytest
import torch

from jamba_lm.training.workers import Workers
from tests.training.test_optimizer import tiny_decoder


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shared_out_work_comes_back_in_order(count):
    threads = torch.get_num_threads()
    try:
        workers = Workers(tiny_decoder(), count)
        seen: set[str] = set()

        def double(number: int) -> int:
            seen.add(threading.current_thread().name)
            return 2 * number

        for items in (0, 1, 2, 7):
            assert workers.spread(double, range(items)) == [2 * n for n in range(items)]
        # A thread that is done early may take the share of a third one.
        assert min(count, 2) <= len(seen) <= count
    finally:
        torch.set_num_threads(threads)


def test_a_failure_in_a_thread_is_not_lost():
    threads = torch.get_num_threads()
    try:
        workers = Workers(tiny_decoder(), 2)
        with pytest.raises(ZeroDivisionError):
            workers.spread(lambda number: 1 // number, [1, 0])
    finally:
        torch.set_num_threads(threads)
