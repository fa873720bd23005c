"""Jamba models into GGUF files that llama.cpp loads.

Streams: one parameter is in memory at a time. Knows nothing of tokenizers; what the header says of
one comes from the caller.

Source: llama.cpp `conversion/base.py` (`prepare_tensors`) and `src/llama-quant.cpp`, for what must
stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.gguf_blocks import encode
from jamba_lm.checkpoint.gguf_config import header_values
from jamba_lm.checkpoint.gguf_names import DECAY, EMBEDDING, HEAD, ROUTER, place_of, stacked_shapes
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.gguf_file import BLOCK_TYPES, TYPE_CODES, BlockType, Shape
from jamba_lm.gguf_output import Pieces, TensorToWrite, Typed, write_gguf

# What --type may be -> the type of the large matrices, and llama.cpp's number for such a file.
FILE_TYPES: Mapping[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
}
QUANTIZATION_VERSION = 2
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class WrittenGguf:
    """What came of writing a file.

    Attributes:
        num_bytes: bytes of all tensors.
        values_by_type: how many values are stored in each type.
        wider: matrices that are F16 because their rows are no whole number of blocks.
    """

    num_bytes: int
    values_by_type: Mapping[str, int]
    wider: tuple[str, ...]


def write_gguf_model(
    path: str | Path,
    config: JambaConfig,
    weights: Mapping[str, Tensor],
    *,
    file_type: str = "bf16",
    name: str = "",
    values: Mapping[str, Typed] | None = None,
    progress: Progress | None = None,
) -> WrittenGguf:
    """Write a GGUF file, whole or not at all.

    Norms, convolutions, decays, skips, biases and routers are float32 in every file: llama.cpp
    demands it. The head of a q4_0 file is Q8_0, as its error reaches every token.

    Args:
        path: where to; an existing file is replaced.
        config: what the weights are of.
        weights: by the decoder's own parameter names; asked for one after the other.
        file_type: a key of `FILE_TYPES`.
        name: what programs show as the model's name.
        values: more of the header: the tokenizer.
        progress: called with the bytes of tensors written, and in all.

    Raises:
        InputError: no such type, or the operating system refused.
        CheckpointError: llama.cpp cannot compute such a model, or a value does not fit the type.
        CheckpointError: a quantised type, and the package `gguf` is missing.
    """
    if file_type not in FILE_TYPES:
        raise InputError(f"no GGUF type {file_type!r}: expected one of {', '.join(FILE_TYPES)}")
    wanted, number = FILE_TYPES[file_type]
    header = header_values(config)
    if name:
        header["general.name"] = ("string", name)
    header["general.file_type"] = ("uint32", number)
    if wanted.startswith("Q"):
        header["general.quantization_version"] = ("uint32", QUANTIZATION_VERSION)

    sources: dict[str, list[str]] = {}
    shapes: list[tuple[str, Shape]] = [(own, tuple(weights[own].shape)) for own in weights]
    for own, _ in shapes:
        sources.setdefault(place_of(own).tensor, []).append(own)
    tensors, wider = [], []
    counts: Counter[str] = Counter()
    for tensor, shape in stacked_shapes(shapes).items():
        kind = stored_type(tensor, shape, wanted, tied=config.tie_embeddings)
        if wanted.startswith("Q") and kind.name == "F16":
            wider.append(tensor)
        pieces = _pieces(weights, sources[tensor], tensor, kind)
        tensors.append(TensorToWrite(tensor, kind, shape, pieces))
        counts[kind.name] += tensors[-1].size // kind.size * kind.values
    num_bytes = write_gguf(path, header | dict(values or {}), tensors, progress)
    return WrittenGguf(num_bytes, counts, tuple(wider))


def stored_type(tensor: str, shape: Shape, wanted: str, *, tied: bool) -> BlockType:
    """Choose how a tensor is stored.

    >>> stored_type("blk.0.ssm_a", (64, 16), "Q4_0", tied=False).name
    'F32'
    >>> stored_type("blk.0.ssm_in.weight", (256, 64), "Q4_0", tied=False).name
    'Q4_0'
    """
    matrix = tensor.endswith(".weight") and len(shape) > 1
    if not matrix or tensor.endswith(("ssm_conv1d.weight", ROUTER)):
        return _type("F32")
    if wanted == "Q4_0" and tensor == (EMBEDDING if tied else HEAD):
        wanted = "Q8_0"
    return _type("F16" if shape[-1] % _type(wanted).values else wanted)


def _type(name: str) -> BlockType:
    return BLOCK_TYPES[TYPE_CODES[name]]


def _pieces(
    weights: Mapping[str, Tensor], owns: list[str], tensor: str, kind: BlockType
) -> Callable[[], Pieces]:
    def pieces() -> Iterator[memoryview]:
        for own in sorted(owns, key=lambda one: place_of(one).expert or 0):
            value = weights[own]
            if tensor.endswith(DECAY):
                value = -torch.exp(value.double())
            yield from encode(value, kind, tensor)

    return pieces
