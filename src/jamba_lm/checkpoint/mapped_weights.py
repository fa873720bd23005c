"""The tensors of a checkpoint folder, plain or packed, as native code reads them: by address.

Only what is as plain as our own files is taken: every tensor has its one name, shape and type. What
is not is left to the readers that make a decoder, which know more spellings and types, and how to
say what is wrong. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jamba_lm.checkpoint.rename import public_name, public_shape
from jamba_lm.checkpoint.weight_layout import find_weight_files
from jamba_lm.config import JambaConfig
from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_structs import (
    BF16_KIND,
    F32_KIND,
    INT4_KIND,
    INT8_KIND,
    Matrix,
    MatrixStruct,
    RowRounding,
)
from jamba_lm.model.parameters import KEPT_WIDE, Shape, parameter_shapes
from jamba_lm.quantization.policy import Scheme
from jamba_lm.tensor_map import MappedTensor, map_tensors

_FLOAT_KINDS = {"F32": F32_KIND, "BF16": BF16_KIND}
# The types of packed parts, by torch's names, as the files name them.
_CODES = {"int8": "I8", "uint8": "U8", "float32": "F32", "bfloat16": "BF16"}

# Bits of a bfloat16: all of its exponent, which only infinity and NaN have, and its sign.
_EXPONENT, _SIGN = 0x7F80, 0x8000


class UnusualCheckpoint(Exception):
    """Something about a checkpoint that is left to other readers."""


def map_weights(folder: Path, config: JambaConfig, scheme: Scheme | None) -> MappedWeights:
    """Map the weights of a folder into memory. Of large ones nothing but scales is read.

    Args:
        folder: in Hugging Face's layout.
        config: from its config.json.
        scheme: likewise; None when it is not quantised.

    Raises:
        UnusualCheckpoint: they are for other readers.
        CheckpointError: there are none, or a file is damaged.
    """
    stored: dict[str, MappedTensor] = {}
    for path, names in find_weight_files(folder).items():
        tensors = map_tensors(path)
        if names is not None and tensors.keys() != names:
            raise UnusualCheckpoint(f"{path.name} does not hold what the index says")
        stored |= tensors
    if config.num_layers > len(stored) or config.num_experts > len(stored):
        # A config may claim a million layers for a file of ten tensors: no list of those is made.
        raise UnusualCheckpoint("it has too few tensors")
    return MappedWeights(stored, parameter_shapes(config), scheme)


class MappedWeights:
    """Tensors of files under the decoder's names, as `step_description.Weights` gives them.

    Attributes:
        scheme: how they are packed; None when they are not.
        bfloat16: what is not packed is in that type, else in float32.
    """

    def __init__(
        self,
        stored: Mapping[str, MappedTensor],
        shapes: Mapping[str, Shape],
        scheme: Scheme | None,
    ) -> None:
        """Take the tensors of a model.

        Args:
            stored: all tensors of a checkpoint, by their names in its files.
            shapes: of the decoder's parameters, by their names there.
            scheme: how they are packed; None when they are not.

        Raises:
            UnusualCheckpoint: they are not exactly those of the model, in one type.
        """
        self._stored = stored
        self._shapes = shapes
        self.scheme = scheme
        self._packings = {
            own: None if scheme is None else scheme.packing(own, shape)
            for own, shape in shapes.items()
        }
        self._check()
        narrow = {
            stored[public_name(own)].code
            for own, packing in self._packings.items()
            if packing is None and own.rpartition(".")[2] not in KEPT_WIDE
        }
        if len(narrow) != 1:
            raise UnusualCheckpoint("its weights are of several types")
        self.bfloat16 = narrow == {"BF16"}

    @property
    def num_bytes(self) -> int:
        """Size of all weights, decays and skips in float32."""
        return sum(self._num_bytes(own) for own in self._shapes)

    def _num_bytes(self, own: str) -> int:
        shape, packing = self._shapes[own], self._packings[own]
        if packing is not None:
            return packing.num_bytes(shape)
        narrow = self.bfloat16 and own.rpartition(".")[2] not in KEPT_WIDE
        return math.prod(shape) * (2 if narrow else 4)

    def _check(self) -> None:
        """Refuse anything but exactly the tensors of the model, where native code can read them."""
        expected: dict[str, tuple[str | None, Shape]] = {}
        for own, packing in self._packings.items():
            shape, public = self._shapes[own], public_name(own)
            if packing is None:
                expected[public] = None, public_shape(own, shape)
            else:
                for part, (kind, extents) in packing.parts(shape).items():
                    expected[f"{public}.{part}"] = _CODES[kind], extents
        if expected.keys() != self._stored.keys():
            raise UnusualCheckpoint("its tensors have other names")
        for name, (code, shape) in expected.items():
            found = self._stored[name]
            fits = found.code in _FLOAT_KINDS if code is None else found.code == code
            if not fits or found.shape != shape:
                raise UnusualCheckpoint(f"{name} is {found.code} of shape {found.shape}")
            if not found.is_aligned:
                raise UnusualCheckpoint(f"{name} lies between the places of {found.code} values")

    def matrix(self, name: str) -> Matrix:
        """Return a matrix with its bias, if it has one, by the name of its module.

        Raises:
            UnusualCheckpoint: a scale of it is none.
        """
        own = f"{name}.weight"
        packing, public = self._packings[own], public_name(own)
        bias = self.vector(f"{name}.bias")
        outputs, inputs = self._shapes[own]
        minimum = None
        if packing is None:
            values, scale = self._stored[public], None
            kind, group, rows8 = _FLOAT_KINDS[values.code], 0, RowRounding.NONE
        else:
            assert self.scheme is not None
            parts = {part: self._stored[f"{public}.{part}"] for part in packing.parts((1, 1))}
            _check_scales(public, parts)
            values, scale = parts["packed" if packing.group else "values"], parts["scale"]
            minimum = parts.get("minimum")
            kind, group = INT4_KIND if packing.group else INT8_KIND, packing.group or 0
            rows8 = self.scheme.rounds_rows(own)
        places = [None if x is None else x.address for x in (values, scale, minimum)]
        places.append(None if bias is None else bias.ctypes.data)
        struct = MatrixStruct(kind, outputs, inputs, group, *places, rows8)
        return Matrix(struct, (values, scale, minimum, bias))

    def vector(self, name: str) -> Floats | None:
        """Return a small parameter, in float32 and contiguous; None when there is none."""
        if name not in self._shapes:
            return None
        return self._stored[public_name(name)].floats().reshape(self._shapes[name])


def _check_scales(public: str, parts: Mapping[str, MappedTensor]) -> None:
    """Refuse what would make every output of a row infinite, or not a number."""
    for part in parts.keys() & {"scale", "minimum"}:
        found = parts[part]
        if found.code == "F32":
            values = found.data.view(np.float32)
            sound = bool(np.isfinite(values).all()) and bool((values >= 0).all())
        else:
            bits = found.data.view(np.uint16)
            sound = not bool(((bits & _EXPONENT) == _EXPONENT).any())
            if part == "scale":
                sound = sound and not bool(((bits & _SIGN != 0) & (bits != _SIGN)).any())
        if not sound:
            raise UnusualCheckpoint(f"{public}.{part} holds values that are no scales")
