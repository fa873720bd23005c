"""What the machine can do for a model at this moment: the limits of its roofline, measured."""

from __future__ import annotations

from benchmarks.calibration import DRAM_BYTES, measure_peaks
from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.analysis.roofline import Speeds
from jamba_lm.config import JambaConfig

# Vector instructions that the scan takes for one vector of states (`docs/results/log.md`).
SCAN_INSTRUCTIONS = 11


def speeds_now(config: JambaConfig, weights: str, threads: int, tries: int = 5) -> Speeds:
    """Measure the limits that a model is held against.

    Args:
        config: whose weights are read: a model that fits into a cache is read from there.
        weights: the type that they are kept in.
        threads: computing at once.
        tries: the best of so many counts.
    """
    product = {"int8": "int8", "fp32": "fp32"}.get(weights, "bf16")
    peaks = measure_peaks(
        threads,
        tries=tries,
        types=[product],
        num_bytes=min(DRAM_BYTES, weight_bytes(config, weights) // 2**20 * 2**20),
    )
    peak = max(peaks.fma_flops, peaks.product_flops[product])
    return Speeds(
        threads=threads,
        read_bytes=peaks.read_bytes,
        amounts={
            "fp32": peaks.fma_flops,
            "bf16": peak,
            "int8": peak,
            "scan": peaks.fma_flops / 2 / SCAN_INSTRUCTIONS,
        },
    )
