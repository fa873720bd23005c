"""A checkpoint that native code reads where it lies: no module is made of it, and torch stays out.

Importing torch takes longer than to load a model and let it answer. What a checkpoint needs to be
read so is that nothing about it is unusual; `open_native` says why it is not, and `LanguageModel`
then opens it, or finds the words for what is wrong with it.

V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from jamba_lm.checkpoint.rename import public_name, public_shape
from jamba_lm.checkpoint.weight_layout import find_weight_files
from jamba_lm.config import JambaConfig, read_config_json
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.gguf_file import is_gguf
from jamba_lm.kernels.choice import requested_backend
from jamba_lm.kernels.library import default_threads, find_library
from jamba_lm.kernels.native_step import STEP_ROWS, Floats, StepModel
from jamba_lm.kernels.native_structs import (
    BF16_KIND,
    F32_KIND,
    INT4_KIND,
    INT8_KIND,
    Matrix,
    MatrixStruct,
)
from jamba_lm.model.array_state import BFLOAT16, ArrayState
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.parameters import KEPT_WIDE, Shape, parameter_shapes
from jamba_lm.native_plan import NativePlan
from jamba_lm.prefill import prefill
from jamba_lm.quantization.policy import Scheme, read_scheme
from jamba_lm.step_description import LayerShape, describe_model
from jamba_lm.tensor_map import MappedTensor, map_tensors

_FLOAT_KINDS = {"F32": F32_KIND, "BF16": BF16_KIND}
# The types of packed parts, by torch's names, as the files name them.
_CODES = {"int8": "I8", "uint8": "U8", "float32": "F32", "bfloat16": "BF16"}

# Bits of a bfloat16: all of its exponent, which only infinity and NaN have, and its sign.
_EXPONENT, _SIGN = 0x7F80, 0x8000


class NativeModel:
    """A model that only native code runs, read from a checkpoint folder.

    It gives the same bits as `LanguageModel` of the same folder, in arrays, and its states are for
    generating alone: they are not saved, and no gradient goes through them.

    Attributes:
        config: what the model is.
        type_name: the type of activations, and of weights that are not packed.
        scheme: how the weights are quantised; None when they are not.
        weight_bytes: size of all weights as they are kept.
    """

    def __init__(self, config: JambaConfig, weights: _FileWeights, threads: int) -> None:
        """Describe the model that `weights` are all of.

        Args:
            config: what it is.
            weights: in the files that they lie in.
            threads: to compute with.
        """
        self.config = config
        self.type_name = "bfloat16" if weights.bfloat16 else "float32"
        self.scheme = weights.scheme
        self.weight_bytes = weights.num_bytes
        self._dtype: type[np.generic] = BFLOAT16 if weights.bfloat16 else np.float32
        layers = [
            LayerShape(
                attends=layer.mixer == "attention",
                experts=config.num_experts if layer.feed_forward == "moe" else 0,
            )
            for layer in plan_layers(config)
        ]
        model = describe_model(
            config, layers, weights, tied=config.tie_embeddings, bfloat16=weights.bfloat16
        )
        self._plan = _FilePlan(model, threads)

    def new_state(self) -> ArrayState:
        """Return the state of a sequence of which nothing has been read."""
        return ArrayState(self.config, self._dtype)

    def require_states(self, states: Sequence[ArrayState]) -> None:
        """Refuse states whose memory this model would not fill, or fill too far.

        Raises:
            InputError: a state was made by a model of other sizes, or in another type.
        """
        for index, state in enumerate(states):
            if not state.fits(self.config, self._dtype):
                raise InputError(
                    f"state {index} was made for a model of other sizes or of another type: start "
                    "with this model's new_state()"
                )

    def step_plan(self) -> NativePlan:
        """Return the plan by which tokens are read."""
        return self._plan

    def next_logits(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[ArrayState] | None = None,
    ) -> Floats:
        """Read several sequences and return the logits after their last tokens, [B, V].

        Args:
            sequences: lists of token ids, all in range, none of them empty.
            states: one state per sequence, all different, which it continues and moves forward in
                place; None starts every sequence afresh.
        """
        ends = accumulate(len(ids) for ids in sequences)
        return self._read(sequences, states, [end - 1 for end in ends])

    def last_logits(
        self,
        sequences: Sequence[Sequence[int]],
        counts: Sequence[int],
        states: Sequence[ArrayState] | None = None,
    ) -> list[Floats]:
        """Read several sequences and return the logits after the last few tokens of each.

        Args:
            sequences: as for `next_logits`.
            counts: after how many of its last tokens, for each sequence.
            states: as for `next_logits`.

        Returns:
            An array [counts_i, V] per sequence.
        """
        ends = accumulate(len(ids) for ids in sequences)
        rows = [
            row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)
        ]
        logits = self._read(sequences, states, rows)
        return np.split(logits, list(accumulate(counts))[:-1])

    def _read(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[ArrayState] | None,
        rows: list[int],
    ) -> Floats:
        states = [self.new_state() for _ in sequences] if states is None else states
        self.require_states(states)
        if sum(map(len, sequences)) <= STEP_ROWS:
            return self._plan.run(sequences, states, rows)
        return prefill(self._plan, sequences, states, rows)


class _FilePlan(NativePlan):
    def __init__(self, model: StepModel, threads: int) -> None:
        super().__init__(model)
        self._threads = threads

    @property
    def threads(self) -> int:
        return self._threads


class _Unusual(Exception):
    """Something about a checkpoint that is left to `LanguageModel`."""


def open_native(
    folder: Path, *, backend: str | None = None, threads: int | None = None
) -> NativeModel | str:
    """Open a checkpoint folder, quantised or not, in the type that it is stored in.

    Args:
        folder: in Hugging Face's layout.
        backend: the back-end that was asked for by name, if any.
        threads: to compute with; None takes one for each core.

    Returns:
        The model; or why it cannot be read so, which does not mean that anything is wrong.
    """
    if is_gguf(folder) or not folder.is_dir():
        return "it is no folder"
    if (backend or requested_backend() or "native") != "native":
        return "another back-end was asked for"
    library = find_library()
    if isinstance(library, str):
        return library
    threads = default_threads(library) if threads is None else threads
    try:
        return _read(folder, threads)
    except (_Unusual, CheckpointError) as reason:
        return str(reason)


def _read(folder: Path, threads: int) -> NativeModel:
    config = JambaConfig.load(folder)
    scheme = read_scheme(read_config_json(folder), str(folder))
    if config.position != "none":
        raise _Unusual("its attention knows positions")
    stored = _stored(folder)
    if config.num_layers > len(stored) or config.num_experts > len(stored):
        # A config may claim a million layers for a file of ten tensors: no list of those is made.
        raise _Unusual("it has too few tensors")
    return NativeModel(config, _FileWeights(stored, parameter_shapes(config), scheme), threads)


def _stored(folder: Path) -> dict[str, MappedTensor]:
    stored: dict[str, MappedTensor] = {}
    for path, names in find_weight_files(folder).items():
        tensors = map_tensors(path)
        if names is not None and tensors.keys() != names:
            raise _Unusual(f"{path.name} does not hold what the index says")
        stored |= tensors
    return stored


class _FileWeights:
    """Tensors of files under the decoder's names, as a description asks for them.

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
            raise _Unusual("its weights are of several types")
        self.bfloat16 = narrow == {"BF16"}

    @property
    def num_bytes(self) -> int:
        """Size of all weights, decays and skips in float32."""
        return sum(
            packing.num_bytes(shape)
            if packing is not None
            else math.prod(shape)
            * (2 if self.bfloat16 and own.rpartition(".")[2] not in KEPT_WIDE else 4)
            for (own, shape), packing in zip(
                self._shapes.items(), self._packings.values(), strict=True
            )
        )

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
            raise _Unusual("its tensors have other names")
        for name, (code, shape) in expected.items():
            found = self._stored[name]
            fits = found.code in _FLOAT_KINDS if code is None else found.code == code
            if not fits or found.shape != shape or not found.is_aligned:
                raise _Unusual(f"{name} is {found.code} of shape {found.shape}")

    def matrix(self, name: str) -> Matrix:
        own = f"{name}.weight"
        packing, public = self._packings[own], public_name(own)
        bias = self.vector(f"{name}.bias")
        outputs, inputs = self._shapes[own]
        minimum = None
        if packing is None:
            values, scale = self._stored[public], None
            kind, group, rows8 = _FLOAT_KINDS[values.code], 0, False
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
            raise _Unusual(f"{public}.{part} holds values that are no scales")
