"""A model from one format to another: Hugging Face folders, quantised ones, and GGUF files.

Weights and tokenizer together, streamed, and the target appears whole or not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.folder import appearing_whole, check_target
from jamba_lm.checkpoint.gguf_reader import GgufWeights
from jamba_lm.checkpoint.gguf_writer import FILE_TYPES, write_gguf_model
from jamba_lm.checkpoint.huggingface import as_dtype, write_decoder
from jamba_lm.checkpoint.packed_reader import stored_scheme
from jamba_lm.checkpoint.stored_weights import open_weights
from jamba_lm.checkpoint.weight_layout import is_ours
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.files import make_folder, path_kind, write_json
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.language_model import load
from jamba_lm.model.parameters import KEPT_WIDE, parameter_shapes
from jamba_lm.quantization.rewrite import PlainWeights
from jamba_lm.text.gguf_tokenizer import folder_files, has_tokenizer, read_documents
from jamba_lm.text.gguf_vocabulary import no_vocabulary, read_vocabulary
from jamba_lm.text.tokenizer_copy import COPIED, copy_tokenizer_files

Progress = Callable[[int, int], None]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of a conversion.

    Attributes:
        num_bytes: bytes of all weights in the target.
        tokenizer: its kind there: "gpt2", "llama" (SentencePiece), or "none".
        values_by_type: how many weights are stored in each type.
        notes: what is not quite the same in the target, a sentence each.
    """

    num_bytes: int
    tokenizer: str
    values_by_type: Mapping[str, int]
    notes: tuple[str, ...]


def folder_to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    file_type: str = "bf16",
    name: str | None = None,
    tokenizer: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint folder as a GGUF file.

    Args:
        source: a folder in Hugging Face's layout; without a tokenizer.json in it, the file takes
            ids only.
        target: the file.
        file_type: of the large matrices: f32, f16, bf16, q8_0 or q4_0.
        name: what programs show as the model's name; the folder's when None.
        tokenizer: whether to take the folder's tokenizer along.
        overwrite: replace a file that is already there.
        progress: called with the bytes of weights written, and in all.

    Raises:
        CheckpointError: no sound checkpoint, or one that llama.cpp cannot compute. A quantised one
            is written as what its matrices stand for.
        TokenizerError: a tokenizer that llama.cpp has no counterpart of.
        ConfigError: config.json is not a possible Jamba config.
        InputError: the target may not be written, or no such type.
    """
    if file_type not in FILE_TYPES:
        raise InputError(f"no GGUF type {file_type!r}: expected one of {', '.join(FILE_TYPES)}")
    target = Path(target)
    kind = path_kind(target)
    if kind not in ("missing", "file") or (kind == "file" and not overwrite):
        raise InputError(f"{str(target)!r} exists: choose another name, or ask to overwrite it")
    with _plain_weights(Path(source)) as (config, weights, _, notes):
        vocabulary = no_vocabulary()
        if tokenizer and path_kind(Path(source) / "tokenizer.json") == "missing":
            notes.append("there is no tokenizer.json: the file takes token ids only")
        elif tokenizer:
            vocabulary = read_vocabulary(source, config.vocab_size)
        make_folder(target.parent)
        written = write_gguf_model(
            target,
            config,
            weights,
            file_type=file_type,
            name=Path(source).resolve().name if name is None else name,
            values=vocabulary.values,
            progress=progress,
        )
    if written.wider:
        notes.append(
            f"{len(written.wider)} matrices are F16, as their rows are no whole number of blocks: "
            f"{written.wider[0]}"
        )
    return Converted(
        written.num_bytes,
        vocabulary.family,
        written.values_by_type,
        (*vocabulary.notes, *notes),
    )


def folder_to_folder(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint folder again as one in Hugging Face's layout, whatever it is kept in.

    Args:
        source: a folder; of a quantised one what its matrices stand for is written, which other
            programs read.
        target: the folder, as in `write_decoder`.
        dtype: to store: fp32, bf16, fp16, or auto for the type that each weight has, and packed
            ones the rest.
        overwrite: replace a checkpoint that is already there.
        progress: called with the bytes of weights written, and in all.

    Raises:
        CheckpointError: no sound checkpoint.
        ConfigError: config.json is not a possible Jamba config.
        InputError: the target may not be written, or no such dtype.
        CapacityError: the disk has too little free space.
    """
    check_target(target, overwrite=overwrite)
    wanted = None if dtype == "auto" else as_dtype(dtype)
    path = Path(source)

    def replaces(name: str) -> bool:
        return is_ours(name) or name in COPIED

    with _plain_weights(path) as (config, weights, natural, notes):
        wanted = wanted or natural
        values: Counter[str] = Counter()
        for own, shape in parameter_shapes(config).items():
            kept = own.rpartition(".")[2] in KEPT_WIDE
            kind = torch.float32 if kept else wanted or weights[own].dtype
            values[str(kind).removeprefix("torch.")] += math.prod(shape)
        with appearing_whole(target, replaces=replaces, overwrite=overwrite) as partial:
            num_bytes = write_decoder(partial, config, weights, dtype=wanted, progress=progress)
            copy_tokenizer_files(path, partial)
            tokenizer = (partial / "tokenizer.json").exists()
    if not tokenizer:
        notes.append("there is no tokenizer.json: put the model's beside the weights")
    return Converted(num_bytes, "as it is" if tokenizer else "none", values, tuple(notes))


@contextmanager
def _plain_weights(
    folder: Path,
) -> Iterator[tuple[JambaConfig, Mapping[str, Tensor], torch.dtype | None, list[str]]]:
    """Give the weights of a folder as other programs know them.

    Yields:
        The config, the weights, the type to store them in where that is not their own, and notes.
    """
    # What is no folder at all is named by those that open one.
    if path_kind(folder) != "folder" or stored_scheme(folder) is None:
        with open_weights(folder) as (config, weights):
            yield config, weights, None, []
        return
    model = load(folder)
    note = "the folder is quantised: written is what its matrices stand for"
    yield model.config, PlainWeights(model.decoder), model.dtype, [note]


def gguf_to_folder(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a GGUF file as a folder in Hugging Face's layout.

    Args:
        source: the file, of any type that can be read.
        target: the folder, as in `write_decoder`.
        dtype: to store: fp32, bf16, fp16, or auto for the type that most values have, which for
            quantised files is bf16.
        overwrite: replace a checkpoint that is already there.
        progress: called with the bytes of weights written, and in all.

    Raises:
        CheckpointError: not a sound GGUF file of a Jamba model.
        TokenizerError: a tokenizer of a kind that is not supported.
        InputError: the target may not be written, or no such dtype.
        CapacityError: the disk has too little free space.
    """
    check_target(target, overwrite=overwrite)
    file = open_gguf(source)
    weights = GgufWeights(file, dtype)
    files = folder_files(read_documents(file)) if has_tokenizer(file) else {}

    def replaces(name: str) -> bool:
        return is_ours(name) or (bool(files) and name in TOKENIZER_FILES)

    with appearing_whole(target, replaces=replaces, overwrite=overwrite) as partial:
        num_bytes = write_decoder(
            partial, weights.config, weights, dtype=weights.dtype, progress=progress
        )
        for name, content in files.items():
            write_json(partial / name, content)
    return Converted(
        num_bytes,
        str(file.get("tokenizer.ggml.model")) if files else "none",
        {str(weights.dtype).removeprefix("torch."): weights.num_values},
        () if files else ("the file has no tokenizer: put the model's beside the weights",),
    )
