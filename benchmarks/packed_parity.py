"""Whether a packed model is what it says it is.

Its weights may be rounded as far as their type explains, and its logits must be those of
transformers holding the same rounded weights. Against the original weights alone neither could be
told from damage: in a deep model of random weights, what is left of four bits of a weight is near
to noise, in every engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.parity_gate import Parity
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.rewrite import PlainWeights

# The largest root mean square error of a matrix, as a share of its root mean square. A row of
# thousands of normal values reaches to four or five of their deviations and has 127 steps on each
# side of zero; 32 to 64 of them reach to about two and a half and have 16 steps in all.
WEIGHT_BOUNDS = {"int8": 0.012, "experts-int4": 0.12, "int4": 0.12}


def unpacked_kind(weights: str) -> str:
    """Return what `parity_gate.BOUNDS` calls a packed type held against its own weights."""
    return f"{weights}, the same weights"


def used_kind(weights: str) -> str:
    """Return what the bounds call the same as it is used, rows in 8 bits where that is faster."""
    return f"{weights}, as used"


def logits_with_rows_kept(packed: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits of a prompt whose rows are rounded nowhere but to the model's type, [T, V].

    Without that rounding, arithmetic that is wrong shows sooner.
    """
    for module in packed.decoder.modules():
        if isinstance(module, PackedLinear):
            module.rows8 = RowRounding.NONE
    return packed.logits([ids])[0]


def largest_weight_error(original: LanguageModel, packed: LanguageModel) -> tuple[str, float]:
    """Return the matrix that was rounded most, and its relative root mean square error."""
    worst, most = "", 0.0
    for name, rounded in PlainWeights(packed.decoder).items():
        exact = original.decoder.get_parameter(name).detach().float()
        error = float((rounded.float() - exact).norm() / exact.norm())
        # Not a number is worst of all.
        if not error <= most:
            worst, most = name, error
    return worst, most


def weight_problem(weights: str, original: LanguageModel, packed: LanguageModel) -> str | None:
    """Say which matrix is further from the original than rounding explains; None when none is."""
    name, error = largest_weight_error(original, packed)
    bound = WEIGHT_BOUNDS[weights]
    if error <= bound:
        return None
    return f"{name} is off by {error:.2g} of its size, {weights} explains {bound:.2g}"


@contextmanager
def unpacked(packed: Path) -> Iterator[Path]:
    """Give a folder that other programs read, with what the packed weights stand for, in bf16."""
    with TemporaryDirectory(dir=packed.parent, prefix=f"{packed.name}-") as place:
        folder = Path(place) / "plain"
        load(packed).save(folder, dequantize=True)
        yield folder


def judged(quality: Parity, arithmetic: Parity, problem: str | None) -> Parity:
    """Return how far a packed model is from the original, with what is wrong with it, if anything.

    Args:
        quality: against the original weights.
        arithmetic: against transformers with the same rounded weights.
        problem: of the weights themselves.
    """
    finite = bool(torch.isfinite(torch.tensor(quality.divergence)))
    own = None if finite else quality.problem
    return replace(quality, problem=own or problem or arithmetic.problem)
