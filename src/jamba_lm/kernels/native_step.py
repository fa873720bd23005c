"""All layers for a few tokens in one native call: what it is told of a model, and the call.

Knows no module of the model: `step_description` describes one to it. Needs no torch.

M rows, B sequences, V vocabulary, D model width, C Mamba channels, N state size, W convolution
taps, R rank of dt; matrices are `[outputs, inputs]`, float or packed.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_structs import FEW_ROWS as STEP_ROWS
from jamba_lm.kernels.native_structs import Matrix, MatrixStruct

__all__ = [
    "STEP_ROWS",
    "Floats",
    "KeyMemory",
    "MambaMemory",
    "MambaVectors",
    "StepCall",
    "StepLayer",
    "StepModel",
    "StepSizes",
    "address_of",
    "memory_words",
    "run_step",
    "words",
]

_Number, _Pointer = ctypes.c_int64, ctypes.c_void_p

Floats = NDArray[np.float32]


class _LayerStruct(ctypes.Structure):
    # jamba_layer of native/jamba_kernels.h.
    _fields_ = (
        ("attends", _Number),
        ("experts", _Number),
        ("mixer_norm_D", _Pointer),
        ("feed_forward_norm_D", _Pointer),
        ("in_proj", MatrixStruct),
        ("x_proj", MatrixStruct),
        ("dt_proj", MatrixStruct),
        ("out_proj", MatrixStruct),
        ("conv_WC", _Pointer),
        ("conv_bias_C", _Pointer),
        ("dt_norm_R", _Pointer),
        ("B_norm_N", _Pointer),
        ("C_norm_N", _Pointer),
        ("dt_bias_C", _Pointer),
        ("A_CN", _Pointer),
        ("skip_C", _Pointer),
        ("router", MatrixStruct),
        ("feed_forward", _Pointer),
    )


class _ModelStruct(ctypes.Structure):
    # jamba_model of native/jamba_kernels.h.
    _fields_ = (
        *((name, _Number) for name in ("num_layers", *"DVCNWRFHGPK", "bfloat16")),
        ("epsilon", ctypes.c_double),
        ("attention_scale", ctypes.c_double),
        ("layers", _Pointer),
        ("final_norm_D", _Pointer),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
    )


# Where the members of jamba_step_call of native/jamba_kernels.h lie, in words of eight bytes;
# behind them a StepCall keeps what they point to.
_PATH, _THREADS, _MODEL, _B, _M, _OFFSETS, _IDS, _MEMORIES, _NUM_LOGITS, _ROWS, _LOGITS = range(11)
_FIRST_OFFSET = 11
_FIRST_ID = _FIRST_OFFSET + STEP_ROWS + 1
_FIRST_ROW = _FIRST_ID + STEP_ROWS
_WORDS = _FIRST_ROW + STEP_ROWS
_WORD_BYTES = 8

# Members of jamba_memory: before and after the step of Mamba, then the blocks of attention.
MEMORY_WORDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaVectors:
    """What a Mamba layer has beside its projections, in contiguous arrays.

    Attributes:
        conv_WC: taps, the oldest token's first.
        conv_bias_C: None where there is none.
        dt_norm_R: gain of an inner norm; None where there is none. Likewise the next two.
        B_norm_N: likewise.
        C_norm_N: likewise.
        dt_bias_C: added to dt before softplus.
        A_CN: negative rates of decay.
        skip_C: what of its input each channel adds to its output.
    """

    conv_WC: Floats
    conv_bias_C: Floats | None
    dt_norm_R: Floats | None
    B_norm_N: Floats | None
    C_norm_N: Floats | None
    dt_bias_C: Floats
    A_CN: Floats
    skip_C: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayer:
    """One layer.

    Attributes:
        mixer_norm_D: gain of the norm before the mixer.
        feed_forward_norm_D: gain of the norm before the feed-forward.
        projections: of Mamba: in, x, dt, out; of attention: queries, keys, values, output, the
            first three of one type.
        mamba: None in a layer of attention.
        experts: gate, up and down of each expert, or of the one feed-forward without a router; all
            gates and ups of one type, all downs too.
        router: None where there is one feed-forward.
    """

    mixer_norm_D: Floats
    feed_forward_norm_D: Floats
    projections: tuple[Matrix, Matrix, Matrix, Matrix]
    mamba: MambaVectors | None
    experts: Sequence[tuple[Matrix, Matrix, Matrix]]
    router: Matrix | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """The sizes that every layer shares, in the order of `jamba_model`."""

    d_model: int
    vocab_size: int
    d_inner: int
    state_size: int
    conv_width: int
    dt_rank: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    d_head: int
    experts_per_token: int


class StepModel:
    """A model as the native step reads it; matrices stay where they lie.

    Attributes:
        vocab_size: width of the logits.
    """

    def __init__(
        self,
        sizes: StepSizes,
        layers: Sequence[StepLayer],
        final_norm_D: Floats,
        embedding: Matrix,
        head: Matrix,
        *,
        bfloat16: bool,
        epsilon: float,
        attention_scale: float,
    ) -> None:
        """Describe a model.

        Args:
            sizes: of all layers.
            layers: first to last.
            final_norm_D: gain of the norm before the head.
            embedding: a row per token.
            head: the embedding itself when they are tied.
            bfloat16: convolution windows, keys and values are in that type, else in float32.
            epsilon: of every norm.
            attention_scale: what scores are multiplied by.
        """
        self.vocab_size = sizes.vocab_size
        self._keep: list[object] = []
        self._arrays: list[ctypes.Array[MatrixStruct]] = []
        self._layers = (_LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))
        self._struct = _ModelStruct(
            len(layers),
            *(getattr(sizes, field.name) for field in fields(sizes)),
            bfloat16,
            epsilon,
            attention_scale,
            ctypes.addressof(self._layers),
            self._vector(final_norm_D),
            self._matrix(embedding),
            self._matrix(head),
        )

    @property
    def address(self) -> int:
        """Where the description lies."""
        return ctypes.addressof(self._struct)

    def _layer(self, layer: StepLayer) -> _LayerStruct:
        matrices = [self._matrix(one) for expert in layer.experts for one in expert]
        array = (MatrixStruct * len(matrices))(*matrices)
        self._arrays.append(array)
        in_proj, x_proj, dt_proj, out_proj = map(self._matrix, layer.projections)
        struct = _LayerStruct(
            attends=layer.mamba is None,
            experts=0 if layer.router is None else len(layer.experts),
            mixer_norm_D=self._vector(layer.mixer_norm_D),
            feed_forward_norm_D=self._vector(layer.feed_forward_norm_D),
            in_proj=in_proj,
            x_proj=x_proj,
            dt_proj=dt_proj,
            out_proj=out_proj,
            feed_forward=ctypes.addressof(array),
        )
        if layer.mamba is not None:
            for field in fields(MambaVectors):
                setattr(struct, field.name, self._vector(getattr(layer.mamba, field.name)))
        if layer.router is not None:
            struct.router = self._matrix(layer.router)
        return struct

    def _vector(self, x: Floats | None) -> int | None:
        if x is None:
            return None
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        self._keep.append(x)
        return x.ctypes.data

    def _matrix(self, matrix: Matrix) -> MatrixStruct:
        self._keep.append(matrix.owners)
        return matrix.struct


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

    Raises:
        BackendUnavailable: the library refused.
    """
    logits = np.empty((len(logit_rows), model.vocab_size), dtype=np.float32)
    blocks: list[array[int]] = []
    remembered = words(number for one in memories for number in memory_words(one, blocks))
    call = StepCall(model, threads, path=path)
    call.arrange(offsets, logit_rows, logits.ctypes.data)
    call.run(ids_M, address_of(remembered))
    return logits


class StepCall:
    """The arguments of a step, in memory that one caller uses again for every call.

    Not for two threads at once.
    """

    def __init__(self, model: StepModel, threads: int, *, path: str | None = None) -> None:
        """Prepare calls for `model`.

        Args:
            model: what to run.
            threads: to compute with.
            path: forces an instruction set, for tests.

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
