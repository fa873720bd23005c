"""What this machine can do, measured in about two seconds: memory reads and arithmetic.

Everything is measured through torch and our own scan, with torch's number of threads, so that a
limit here is one that a model can reach. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from jamba_lm.analysis.roofline import Speeds, Unit
from jamba_lm.kernels import ops

# Larger than the caches of most processors; a model's weights may be fewer bytes than that.
LARGEST_SET = 512 * 1024**2
SMALLEST_SET = 4 * 1024**2
# A product whose rows and columns are many enough to reach the peak, and still takes milliseconds.
PRODUCT_ROWS, PRODUCT_WIDTH = 512, 2048
SCAN_TOKENS, SCAN_CHANNELS, SCAN_STATES = 256, 2048, 16
# Each thing is tried for this long, and at least this often; the best try counts.
SECONDS_EACH, FEWEST_TRIES = 0.15, 3


def measure_speeds(working_set: int = LARGEST_SET) -> Speeds:
    """Measure the limits of this machine with torch's number of threads.

    Args:
        working_set: bytes that are read over and over, such as the weights of a model: what fits
            into a cache is read faster. At most `LARGEST_SET` are used.
    """
    amounts: dict[Unit, float] = {
        "fp32": product_speed(torch.float32),
        "bf16": product_speed(torch.bfloat16),
        "int8": _int8_product_speed(),
        "scan": _scan_speed(),
    }
    return Speeds(
        threads=torch.get_num_threads(),
        read_bytes=read_speed(working_set),
        amounts=amounts,
    )


def read_speed(working_set: int) -> float:
    """Return the bytes a second that a product of a matrix and a vector reads its matrix with."""
    num_bytes = max(SMALLEST_SET, min(working_set, LARGEST_SET))
    width = 4096
    weight = torch.ones(num_bytes // (4 * width), width)
    x = torch.ones(width)
    return weight.nbytes / _best_seconds(lambda: torch.mv(weight, x))


def product_speed(dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product of this type."""
    x = torch.ones(PRODUCT_ROWS, PRODUCT_WIDTH, dtype=dtype)
    w = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype)
    return _product_amount() / _best_seconds(lambda: F.linear(x, w))


def _int8_product_speed() -> float:
    x = torch.ones(PRODUCT_ROWS, PRODUCT_WIDTH, dtype=torch.int8)
    w = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=torch.int8)
    return _product_amount() / _best_seconds(lambda: torch._int_mm(x, w.t()))


def _product_amount() -> float:
    return 2.0 * PRODUCT_ROWS * PRODUCT_WIDTH**2


def _scan_speed() -> float:
    T, C, N = SCAN_TOKENS, SCAN_CHANNELS, SCAN_STATES
    u_MC, dt_MC = torch.ones(T, C), torch.zeros(T, C)
    bias_C, skip_C = torch.full((C,), -4.0), torch.ones(C)
    A_CN = -torch.arange(1.0, N + 1).repeat(C, 1)
    B_MN, C_MN = torch.ones(T, N), torch.ones(T, N)
    offsets = torch.tensor([0, T])
    seconds = _best_seconds(
        lambda: ops.selective_scan(u_MC, dt_MC, bias_C, A_CN, B_MN, C_MN, skip_C, offsets)
    )
    return T * C * N / seconds


def _best_seconds(action: Callable[[], object]) -> float:
    """Return the shortest time of `action`: whatever else runs can only make it longer."""
    action()
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < FEWEST_TRIES or time.perf_counter() - begun < SECONDS_EACH:
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
        tries += 1
    return best
