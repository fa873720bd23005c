"""What the machine can do for a model at this moment: the limits of its roofline, measured."""

from __future__ import annotations

from benchmarks.calibration import DRAM_BYTES, measure_peaks
from benchmarks.our_model import FLOATS
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
    # Rows may be rounded to 8 bits for a packed matrix; what is not packed is a product of bf16.
    products = [weights] if weights in FLOATS else ["bf16", "int8"]
    peaks = measure_peaks(
        threads,
        tries=tries,
        types=products,
        num_bytes=min(DRAM_BYTES, weight_bytes(config, weights) // 2**20 * 2**20),
    )
    peak = {one: max(peaks.fma_flops, flops) for one, flops in peaks.product_flops.items()}
    return Speeds(
        threads=threads,
        read_bytes=peaks.read_bytes,
        amounts={
            "fp32": peaks.fma_flops,
            "bf16": peak.get("bf16", peaks.fma_flops),
            "int8": peak.get("int8", peaks.fma_flops),
            "scan": peaks.fma_flops / 2 / SCAN_INSTRUCTIONS,
        },
    )
