"""Quantised checkpoint folders written: packed one matrix at a time, whole or not at all.

What a folder says of itself makes other programs refuse it: its model type is this project's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.folder import appearing_whole, check_target
from jamba_lm.checkpoint.huggingface import (
    SHARD_BYTES,
    Progress,
    as_dtype,
    check_room,
    generation_config,
    read_decoder,
)
from jamba_lm.checkpoint.packed_reader import StreamedWeights, refuse_packed
from jamba_lm.checkpoint.rename import Shape, public_name, public_shape
from jamba_lm.checkpoint.shards import plan_shards, write_index
from jamba_lm.checkpoint.weight_layout import is_ours
from jamba_lm.config import JambaConfig
from jamba_lm.config_json import write_fields
from jamba_lm.errors import InputError
from jamba_lm.files import write_atomic, write_json
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import KEPT_WIDE
from jamba_lm.quantization.calibration import calibrate_decoder
from jamba_lm.quantization.policy import Packing, Scheme
from jamba_lm.quantization.rewrite import quantize_weight, stored_tensors
from jamba_lm.tensor_file import TensorSpec, write_tensors_as_made

# What belongs to a model beside its weights, and is copied as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)

# The tensors that stand for one parameter: "" for a plain one, else the parts of a packed one.
Parts = Mapping[str, Tensor]


def quantize_folder(
    source: str | Path,
    target: str | Path,
    scheme: Scheme,
    *,
    dtype: str | torch.dtype = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a quantised copy of a checkpoint folder, tokenizer and chat template included.

    Only one matrix and what becomes of it are in memory at a time.

    Args:
        source: a checkpoint in Hugging Face's layout, not quantised.
        target: where to, as in `write_decoder`.
        scheme: what to pack, and how.
        dtype: of what is not packed; "auto" keeps that of the source.
        shard_bytes: as in `write_decoder`.
        overwrite: as in `write_decoder`.
        progress: called with bytes written and bytes in all.

    Returns:
        The bytes of all weights.

    Raises:
        InputError: `source` is quantised already or is `target`, or an option is impossible.
        CheckpointError: `source` cannot be read, or holds NaN or infinity.
        ConfigError: its config.json is not a possible Jamba config.
        CapacityError: the disk has too little free space.
    """
    source, target = Path(source), Path(target)
    _check_folders(source, target, overwrite=overwrite)
    config = JambaConfig.load(source)
    weights = StreamedWeights(source, config, None if dtype == "auto" else as_dtype(dtype))
    shapes = {own: tuple(p.shape) for own, p in weights.blank.named_parameters()}

    def parts(own: str) -> Parts:
        value, packing = weights[own], scheme.packing(own, shapes[own])
        return {"": value} if packing is None else quantize_weight(own, value, packing).tensors()

    return _write(
        target,
        config,
        scheme,
        shapes,
        weights.dtype,
        parts,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
        companions_of=source,
    )


def calibrate_folder(
    source: str | Path,
    target: str | Path,
    scheme: Scheme,
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str | torch.dtype = "auto",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a quantised copy of a checkpoint folder, rounded for a text (`calibration.py`).

    Args:
        source: as in `quantize_folder`.
        target: likewise.
        scheme: likewise; some of it in 4 bits.
        sequences: token ids of the text.
        dtype: as in `quantize_folder`.
        shard_bytes: likewise.
        overwrite: likewise.
        progress: called with the values packed and the values in all.

    Returns and raises what `quantize_folder` does, and raises what `calibrate_decoder` does.
    """
    source, target = Path(source), Path(target)
    # It takes long: what can be said against the target is said first.
    _check_folders(source, target, overwrite=overwrite)
    config, decoder = read_decoder(source, dtype)
    calibrate_decoder(decoder, scheme, sequences, progress)
    return write_packed_decoder(
        target,
        config,
        decoder,
        scheme,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        companions_of=source,
    )


def write_packed_decoder(
    folder: str | Path,
    config: JambaConfig,
    decoder: Decoder,
    scheme: Scheme,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    companions_of: Path | None = None,
) -> int:
    """Write a decoder whose matrices are packed by `scheme`, as they are.

    What belongs to the model beside its weights comes from the folder `companions_of`, if any.
    Returns and raises what `quantize_folder` does, as far as it can happen.
    """
    check_target(folder, overwrite=overwrite)
    with torch.device("meta"):
        blank = Decoder(config)
    shapes = {own: tuple(p.shape) for own, p in blank.named_parameters()}
    tensors = dict(stored_tensors(decoder))

    def parts(own: str) -> Parts:
        packing = scheme.packing(own, shapes[own])
        if packing is None:
            return {"": tensors[own].detach()}
        return {part: tensors[f"{own}.{part}"] for part in packing.parts(shapes[own])}

    dtype = decoder.final_norm.weight.dtype
    return _write(
        Path(folder),
        config,
        scheme,
        shapes,
        dtype,
        parts,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        companions_of=companions_of,
    )


def _check_folders(source: Path, target: Path, *, overwrite: bool) -> None:
    check_target(target, overwrite=overwrite)
    if target.resolve() == source.resolve():
        raise InputError(f"{str(target)!r} is the checkpoint to quantise: choose another folder")
    refuse_packed(source, "so it cannot be quantised")


def _write(
    target: Path,
    config: JambaConfig,
    scheme: Scheme,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    parts: Callable[[str], Parts],
    *,
    shard_bytes: int,
    overwrite: bool,
    progress: Progress | None = None,
    companions_of: Path | None,
) -> int:
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}: expected a positive number of bytes")
    specs = {
        own: _specs(own, shape, scheme.packing(own, shape), dtype) for own, shape in shapes.items()
    }
    sizes = {own: sum(_num_bytes(spec) for spec in specs[own]) for own in shapes}
    shards = plan_shards(sizes, dict.fromkeys(shapes, dtype), shard_bytes)
    total = sum(sizes.values())
    check_room(target, total)
    written = 0

    def values(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        nonlocal written
        for own in names:
            for spec, (part, tensor) in zip(specs[own], parts(own).items(), strict=True):
                assert spec[0].endswith(part), own
                yield spec[0], tensor.reshape(tuple(spec[2]))
            written += sizes[own]
            if progress is not None:
                progress(written, total)

    with appearing_whole(target, replaces=is_ours, overwrite=overwrite) as partial:
        for file_name, names in shards.items():
            # Wider types first: then every tensor is aligned to its type in the map.
            listed = sorted(
                (spec for own in names for spec in specs[own]), key=lambda spec: -spec[1].itemsize
            )
            write_tensors_as_made(partial / file_name, listed, values(names), {"format": "pt"})
        if len(shards) > 1:
            stored = {
                file: [spec[0] for own in names for spec in specs[own]]
                for file, names in shards.items()
            }
            write_index(partial, stored, total)
        content = {
            **write_fields(config.to_dict(), own=True),
            "dtype": str(dtype).removeprefix("torch."),
            "quantization_config": scheme.to_json(),
        }
        write_json(partial / "config.json", content)
        write_json(partial / "generation_config.json", generation_config(config))
        if companions_of is not None:
            _copy_companions(companions_of, partial)
    return total


def _specs(own: str, shape: Shape, packing: Packing | None, dtype: torch.dtype) -> list[TensorSpec]:
    public = public_name(own)
    if packing is None:
        kept = torch.float32 if own.rpartition(".")[2] in KEPT_WIDE else dtype
        return [(public, kept, public_shape(own, shape))]
    return [
        (f"{public}.{part}", getattr(torch, type_name), part_shape)
        for part, (type_name, part_shape) in packing.parts(shape).items()
    ]


def _num_bytes(spec: TensorSpec) -> int:
    return torch.Size(spec[2]).numel() * spec[1].itemsize


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            _copy_file(source / name, target / name)


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write_atomic(target, lambda out: shutil.copyfileobj(file, out))
