"""All layers for many tokens in one native call, where multiplying is the work.

M rows, B sequences, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_layers import Floats, StepModel
from jamba_lm.kernels.native_step import KeyMemory, MambaMemory, address_of, memory_words, words
from jamba_lm.kernels.part_times import PartTimes, spent_address


def run_prefill(
    model: StepModel,
    ids_M: Sequence[int],
    offsets: Sequence[int],
    memories: Sequence[MambaMemory | KeyMemory],
    logit_rows: Sequence[int],
    *,
    threads: int,
    path: str | None = None,
    times: PartTimes | None = None,
) -> Floats:
    """Run every layer and return the logits after `logit_rows`, `[len(logit_rows), V]`.

    Working memory grows with M: some 60 KB for each token of a model of 3 billion parameters.

    Args:
        model: what to run.
        ids_M: token ids of all sequences end to end, all in range.
        offsets: B+1 numbers: where each sequence starts, and M.
        memories: layer by layer, and within a layer sequence by sequence.
        logit_rows: rows whose logits are wanted, at most M; may be none.
        threads: to compute with.
        path: forces an instruction set, for tests.
        times: what the call adds to, where somebody asks.

    Raises:
        BackendUnavailable: the library refused.
    """
    library = loaded_library()
    logits = np.empty((len(logit_rows), model.vocab_size), dtype=np.float32)
    blocks: list[array[int]] = []
    remembered = words(number for one in memories for number in memory_words(one, blocks))
    bounds, ids, rows = words(offsets), words(ids_M), words(logit_rows)
    # jamba_step_call of native/jamba_kernels.h.
    call = words(
        (
            library.path_code(path),
            threads,
            model.address,
            len(offsets) - 1,
            len(ids_M),
            address_of(bounds),
            address_of(ids),
            address_of(remembered),
            len(logit_rows),
            address_of(rows),
            logits.ctypes.data,
            spent_address(times, threads),
        )
    )
    library.call("jamba_prefill", call.tobytes())
    return logits
