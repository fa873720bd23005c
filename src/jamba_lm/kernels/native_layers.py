"""A model as the native step and prefill are told of it: what lies where. Needs no torch.

Knows no module of the model: `step_description` describes one.

V vocabulary, D model width, C Mamba channels, N state size, W convolution taps, R rank of dt;
matrices are `[outputs, inputs]`, float or packed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from jamba_lm.kernels.native_structs import Matrix, MatrixStruct

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
