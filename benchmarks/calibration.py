"""What the machine can do at this moment: multiply-adds, memory reads, matrix products.

The probe of multiply-adds takes some milliseconds and can be put between any two timings; it runs
in this process, in bursts shorter than a scheduler's time slice, on as many threads as the work
that is timed. It knows nothing of what is measured beside it.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("machine_probe.cpp")

BURSTS = 9
ROUNDS = 80_000  # about a quarter of a millisecond: most bursts end before a time slice does

# The threads of OpenMP spin for up to this long after a parallel loop, waiting for the next one,
# and would be counted as neighbours.
REST_SECONDS = 0.02

# Larger than any cache of today, the second one too.
DRAM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Probe:
    """How fast multiply-adds were at one moment, in nanoseconds for one of the widest vectors.

    Attributes:
        wall: by the clock on the wall: the median of the slowest thread. Neighbours inside this
            machine show here, and a lower frequency or neighbours outside do as well.
        own: by the threads' own processor time: neighbours inside this machine do not show.
    """

    wall: float
    own: float


@functools.cache
def probe_library() -> ctypes.CDLL:
    """Build the probe for this machine, once in a process, and load it."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        sys.exit("error: a C++ compiler is needed to measure what the machine can do")
    with tempfile.TemporaryDirectory() as folder:
        digest = sha256(SOURCE.read_bytes()).hexdigest()[:12]
        library = Path(folder, f"machine_probe_{digest}.so")
        flags = ["-O2", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
        handle = ctypes.CDLL(str(library))
    handle.probe_multiply_adds.argtypes = [
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
        ctypes.POINTER(ctypes.c_double),
    ]
    handle.probe_multiply_adds.restype = None
    handle.probe_read.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    handle.probe_read.restype = ctypes.c_double
    return handle


def probe(threads: int, *, rest_seconds: float = REST_SECONDS) -> Probe:
    """Measure the rate of multiply-adds with `threads` threads at once."""
    handle = probe_library()
    time.sleep(rest_seconds)
    values = (ctypes.c_double * (threads * BURSTS * 2))()
    handle.probe_multiply_adds(threads, BURSTS, ROUNDS, values)
    each = [values[2 * BURSTS * thread : 2 * BURSTS * (thread + 1)] for thread in range(threads)]
    return Probe(
        wall=max(statistics.median(one[0::2]) for one in each),
        own=max(statistics.median(one[1::2]) for one in each),
    )


def read_bandwidth(threads: int, num_bytes: int = DRAM_BYTES, repeats: int = 5) -> float:
    """Return how many bytes a second `threads` threads read from `num_bytes` of memory."""
    seconds = probe_library().probe_read(threads, num_bytes, repeats)
    if not seconds:
        sys.exit(f"error: no {num_bytes:,} bytes of memory are free to measure reading with")
    return num_bytes / seconds


@dataclass(frozen=True, slots=True)
class Peaks:
    """Limits of the machine with a number of threads, each the best of several tries.

    Attributes:
        threads: computing at once.
        fma_flops: single precision multiply-adds in registers, counted as two operations.
        read_bytes: bytes read from memory in a second.
        product_flops: operations a second of torch's largest matrix products, by type.
    """

    threads: int
    fma_flops: float
    read_bytes: float
    product_flops: dict[str, float]


def measure_peaks(
    threads: int,
    *,
    tries: int = 5,
    rows: int = 1024,
    width: int = 2048,
    types: Iterable[str] = ("fp32", "bf16", "int8"),
    num_bytes: int = DRAM_BYTES,
) -> Peaks:
    """Measure the limits with torch's number of threads set to `threads`.

    Args:
        threads: computing at once.
        tries: the best of so many counts.
        rows: of the matrix products.
        width: of their matrices.
        types: of the products that are wanted.
        num_bytes: what is read; less than a cache holds is read from there.
    """
    torch.set_num_threads(threads)
    lanes = probe_library().probe_lanes()
    fastest = min(probe(threads).wall for _ in range(tries))
    return Peaks(
        threads=threads,
        fma_flops=2e9 * lanes * threads / fastest,
        read_bytes=read_bandwidth(threads, num_bytes, repeats=tries),
        product_flops={
            name: 2.0 * rows * width * width / best_seconds(run, tries)
            for name, run in products(rows, width).items()
            if name in types
        },
    )


def products(rows: int, width: int) -> dict[str, Callable[[], object]]:
    """Return a large matrix product of each type that weights are kept in."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=draw)
    w = torch.randn(width, width, generator=draw)
    x_bf16, w_bf16 = x.bfloat16(), w.bfloat16()
    x_int8, w_int8 = (16 * x).to(torch.int8), (16 * w).to(torch.int8).t()
    linear = torch.nn.functional.linear
    return {
        "fp32": lambda: linear(x, w),
        "bf16": lambda: linear(x_bf16, w_bf16),
        "int8": lambda: torch._int_mm(x_int8, w_int8),
    }


def best_seconds(action: Callable[[], object], tries: int) -> float:
    """Return the shortest of `tries` times of `action`, after two that do not count."""
    seconds = []
    for attempt in range(tries + 2):
        started = time.perf_counter()
        action()
        if attempt >= 2:
            seconds.append(time.perf_counter() - started)
    return min(seconds)
