"""Opens a checkpoint in one of the types that the benchmarks compare, and keeps packed ones."""

from __future__ import annotations

from pathlib import Path

from jamba_lm.language_model import LanguageModel, load

# Types that are floats in the checkpoint; the others are schemes of quantisation.
FLOATS = ("fp32", "bf16")


def open_model(folder: str | Path, weights: str, backend: str | None = None) -> LanguageModel:
    """Load a checkpoint in fp32 or bf16, or one that `packed_folder` has packed already."""
    return load(folder, dtype=weights if weights in FLOATS else "auto", backend=backend)


def packed_folder(checkpoint: Path, weights: str) -> Path:
    """Return a folder with the checkpoint in this type: itself, or one packed beside it, once."""
    if weights in FLOATS:
        return checkpoint
    packed = checkpoint.with_name(f"{checkpoint.name}-{weights}")
    if not packed.exists():
        load(checkpoint, dtype="bf16", quantize=weights).save(packed)
    return packed
