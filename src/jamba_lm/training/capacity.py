"""Whether a run can fit into this machine at all, asked before anything of it is made.

Needs no torch. Knows a recipe and a number of bytes.
"""

from __future__ import annotations

from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.rank_memory import rank_memory
from jamba_lm.errors import CapacityError
from jamba_lm.training.recipe import Recipe

WIDTHS = {"fp32": 4, "bf16": 2}
GIB = 2**30


def check_memory(recipe: Recipe, usable: int) -> None:
    """Refuse a run whose weights, gradients and optimizer are more than there is for a process.

    Activations are not counted, which depend on what is read: what passes here may still be too
    large, and what does not pass is.

    Args:
        recipe: with a layout that its model can have.
        usable: bytes that a process may take.

    Raises:
        CapacityError: it cannot fit.
    """
    training, layout = recipe.training, recipe.parallel
    work = Pass(sequences=1, tokens=layout.context, width=WIDTHS[training.dtype])
    passes = training.accumulate // training.workers
    memory, _ = rank_memory(Rank(recipe.model, layout, work), passes, workers=training.workers)
    needed = memory.parameters + memory.gradients + memory.optimizer
    if needed > usable:
        raise CapacityError(
            f"weights, gradients and AdamW of this model take {needed / GIB:,.1f} GiB in each of "
            f"{layout.world_size:,} processes, and this machine has {usable / GIB:,.1f} GiB: share "
            "the model out over more processes ([parallel], which `jamba plan train` plans), or "
            "take a smaller one"
        )
