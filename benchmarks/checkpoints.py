"""The three shapes with random weights, kept outside the repository between runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.presets import preset

SHAPES = ("tiny", "mid", "3b")
GIB = 1024**3


def checkpoint(shape: str, cache: Path) -> Path:
    """Return a checkpoint of a shape in bf16, written once for a cache folder.

    GGUF files of it will lie beside it, so three times its size must be free.
    """
    folder = cache / shape
    if (folder / "config.json").exists():
        return folder
    needed = 3 * weight_bytes(preset(shape), "bf16")
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        sys.exit(
            f"error: {shape} and its GGUF files take {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB "
            f"are free in {cache}; name another place: --cache DIR"
        )
    write_random_checkpoint(folder, preset(shape), dtype="bf16", seed=0)
    return folder


def truth_type(shape: str) -> str:
    """Return the widest type that transformers can hold the shape in, beside another engine."""
    config = preset(shape)
    both = weight_bytes(config, "fp32") + weight_bytes(config, "bf16")
    return "fp32" if both < 0.85 * usable_memory() else "bf16"


def fits_together(shape: str, copies: int) -> bool:
    """Say whether so many engines may hold the shape's bf16 weights at the same time."""
    return copies * weight_bytes(preset(shape), "bf16") < 0.6 * usable_memory()
