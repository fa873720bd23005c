"""All layers for a few tokens in one native call. Needs no torch.

M rows, B sequences, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_layers import Floats, StepModel
from jamba_lm.kernels.native_structs import FEW_ROWS as STEP_ROWS
from jamba_lm.kernels.part_times import PartTimes, spent_address

__all__ = [
    "STEP_ROWS",
    "KeyMemory",
    "MambaMemory",
    "StepCall",
    "address_of",
    "memory_words",
    "run_step",
    "words",
]

# Where the members of jamba_step_call of native/jamba_kernels.h lie, in words of eight bytes;
# behind them a StepCall keeps what they point to.
_PATH, _THREADS, _MODEL, _B, _M, _OFFSETS, _IDS, _MEMORIES = range(8)
_NUM_LOGITS, _ROWS, _LOGITS, _SPENT = range(8, 12)
_FIRST_OFFSET = 12
_FIRST_ID = _FIRST_OFFSET + STEP_ROWS + 1
_FIRST_ROW = _FIRST_ID + STEP_ROWS
_WORDS = _FIRST_ROW + STEP_ROWS
_WORD_BYTES = 8

# Members of jamba_memory: before and after the step of Mamba, then the blocks of attention.
MEMORY_WORDS = 6


@dataclass(frozen=True, slots=True)
class MambaMemory:
    """Where one sequence's memory of one Mamba layer lies.

    Attributes:
        before: addresses of the convolution window and of the scan state.
        after: of those after the step, which writes them.
    """

    before: tuple[int, int]
    after: tuple[int, int]


@dataclass(frozen=True, slots=True)
class KeyMemory:
    """The keys and values of one sequence in one layer, a block after the other.

    Attributes:
        blocks: for each block the addresses of its keys and of its values, `[S_j, G, P]` each, and
            how many tokens it holds. The last rows of the last block are those of the step, which
            writes them.
    """

    blocks: Sequence[int]


def run_step(
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

    Args:
        model: what to run.
        ids_M: token ids of all sequences end to end, at most `STEP_ROWS`, all in range.
        offsets: B+1 numbers: where each sequence starts, and M.
        memories: layer by layer, and within a layer sequence by sequence.
        logit_rows: rows whose logits are wanted, at least one.
        threads: to compute with.
        path: forces an instruction set, for tests.
        times: what the call adds to, where somebody asks.

    Raises:
        BackendUnavailable: the library refused.
    """
    logits = np.empty((len(logit_rows), model.vocab_size), dtype=np.float32)
    blocks: list[array[int]] = []
    remembered = words(number for one in memories for number in memory_words(one, blocks))
    call = StepCall(model, threads, path=path, times=times)
    call.arrange(offsets, logit_rows, logits.ctypes.data)
    call.run(ids_M, address_of(remembered))
    return logits


class StepCall:
    """The arguments of a step, in memory that one caller uses again for every call.

    Not for two threads at once.
    """

    def __init__(
        self,
        model: StepModel,
        threads: int,
        *,
        path: str | None = None,
        times: PartTimes | None = None,
    ) -> None:
        """Prepare calls for `model`.

        Args:
            model: what to run.
            threads: to compute with.
            path: forces an instruction set, for tests.
            times: what calls add to, where somebody asks.

        Raises:
            BackendUnavailable: the library is missing, or the processor cannot run `path`.
        """
        self._library = loaded_library()
        self._model = model
        self._words = words(bytes(_WORDS * _WORD_BYTES))
        start = address_of(self._words)
        self._words[_PATH] = self._library.path_code(path)
        self._words[_THREADS] = threads
        self._words[_MODEL] = model.address
        self._words[_OFFSETS] = start + _FIRST_OFFSET * _WORD_BYTES
        self._words[_IDS] = start + _FIRST_ID * _WORD_BYTES
        self._words[_ROWS] = start + _FIRST_ROW * _WORD_BYTES
        self._words[_SPENT] = spent_address(times, threads)
        # The library writes there as long as this lives.
        self._times = times
        self._struct = ctypes.c_char_p(start)

    def arrange(self, offsets: Sequence[int], logit_rows: Sequence[int], logits: int) -> None:
        """Say how the rows of the next calls are divided up.

        Args:
            offsets: B+1 numbers: where each sequence starts, and M.
            logit_rows: rows whose logits are wanted, at least one.
            logits: address of float32 `[len(logit_rows), V]`, which calls write.
        """
        here = self._words
        here[_B], here[_M], here[_NUM_LOGITS] = len(offsets) - 1, offsets[-1], len(logit_rows)
        here[_LOGITS] = logits
        # The library refuses what there is no room for, by the counts.
        for place, offset in zip(range(_FIRST_OFFSET, _FIRST_ID), offsets, strict=False):
            here[place] = offset
        for place, row in zip(range(_FIRST_ROW, _WORDS), logit_rows, strict=False):
            here[place] = row

    def run(self, ids_M: Sequence[int], memories: int) -> None:
        """Run every layer.

        Args:
            ids_M: token ids of all sequences end to end, as many as was arranged, all in range.
            memories: address of `MEMORY_WORDS` words for each layer and, within it, each sequence.

        Raises:
            BackendUnavailable: the library refused; nothing was written.
        """
        here = self._words
        place = _FIRST_ID
        for token in ids_M[:STEP_ROWS]:
            here[place] = token
            place += 1
        here[_MEMORIES] = memories
        self._library.call("jamba_step", self._struct)


def words(values: bytes | Iterable[int]) -> array[int]:
    """Return numbers as the native code reads them, eight bytes each."""
    return array("q", values)


def address_of(numbers: array[int]) -> int:
    """Return where the numbers lie, for as long as none is added."""
    return numbers.buffer_info()[0]


def memory_words(memory: MambaMemory | KeyMemory, blocks: list[array[int]]) -> tuple[int, ...]:
    """Return the members of a `jamba_memory`; an array that it points to goes to `blocks`."""
    if isinstance(memory, MambaMemory):
        return *memory.before, *memory.after, 0, 0
    blocks.append(words(memory.blocks))
    return (0, 0, 0, 0, len(memory.blocks) // 3, address_of(blocks[-1]))
