"""Jamba checkpoints in Hugging Face's folder layout, read and written.

Every stored tensor is used and every parameter filled, or the folder is refused. Knows nothing of
tokenizers, devices or quantised weights.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from jamba_lm.checkpoint import diagnosis
from jamba_lm.checkpoint.diagnosis import Mismatch, shown, shown_shape
from jamba_lm.checkpoint.folder import appearing_whole, check_target
from jamba_lm.checkpoint.rename import (
    Shape,
    Source,
    find_sources,
    public_name,
    public_shape,
    source_shape,
)
from jamba_lm.checkpoint.shards import WeightFiles, plan_shards, write_index
from jamba_lm.checkpoint.weight_layout import is_ours
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError, CheckpointError, InputError
from jamba_lm.files import write_json
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import KEPT_WIDE
from jamba_lm.tensor_file import write_tensor_stream

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SHARD_BYTES = 5 * 10**9
Progress = Callable[[int, int], None]


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as "bf16", or the dtype itself.

    Raises:
        InputError: weights are not kept in such a type.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return found


def read_decoder(
    folder: str | Path, dtype: str | torch.dtype = "auto"
) -> tuple[JambaConfig, Decoder]:
    """Read the config and the weights of a checkpoint folder.

    Weights stay in the memory map of their file, and are read from disk when first used, wherever
    the stored type is the one asked for. The decays (A_log) and skips (D) are float32 in any case.

    Args:
        folder: holds config.json and model.safetensors, or an index and its shards.
        dtype: of the other weights: "fp32", "bf16", "fp16", a torch dtype, or "auto", the type
            that most of the stored values have.

    Raises:
        CheckpointError: no weights, damaged or unsafe ones, or ones that do not fit config.json;
            one message lists what differs and which fields are likely wrong.
        ConfigError: config.json is not a possible Jamba config.
        InputError: no such `dtype`.
    """
    wanted = None if dtype == "auto" else as_dtype(dtype)
    with open_checkpoint(folder) as (config, files):
        decoder, sources = find_parameters(config, files, Path(folder))
        if wanted is None:
            wanted = prevalent_dtype(files)
        for own, source in sources.items():
            place(decoder, own, read_parameter(decoder, files, own, source, wanted))
        return config, decoder


@contextmanager
def open_checkpoint(folder: str | Path) -> Iterator[tuple[JambaConfig, WeightFiles]]:
    """Give the config of a checkpoint folder, and its files of weights, open.

    Raises:
        CheckpointError: no such folder, or no sound files of weights in it.
        ConfigError: config.json is not a possible Jamba config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {str(folder)!r}: "
            "expected a folder with config.json and *.safetensors"
        )
    config = JambaConfig.load(folder)
    with WeightFiles.open(folder) as files:
        yield config, files


def find_parameters(
    config: JambaConfig, files: WeightFiles, folder: Path
) -> tuple[Decoder, dict[str, Source]]:
    """Return a decoder without values, and where the value of each of its parameters is stored.

    Raises:
        CheckpointError: the stored tensors are not exactly those of the config.
    """
    _check_dtypes(files)
    stored = files.shapes
    sources = find_sources(stored, config.num_experts)
    shapes = {
        public: source_shape(found[0], stored[found[0].tensor]) for public, found in sources.items()
    }
    check_scale(config, shapes, folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    own_names = {public_name(own): own for own, _ in decoder.named_parameters()}
    needed = {
        public: public_shape(own, decoder.get_parameter(own).shape)
        for public, own in own_names.items()
    }
    _drop_tied_head(config, files, sources)
    mismatch = _compare(needed, shapes, sources)
    if mismatch:
        clues = diagnosis.find_clues(config, shapes)
        because = f"; likely wrong: {'; '.join(clues)}" if clues else ""
        raise CheckpointError(
            f"the weights in {str(folder)!r} do not fit its config.json{because}; "
            f"{mismatch.describe()}"
        )
    return decoder, {own: sources[public][0] for public, own in own_names.items()}


def read_parameter(
    decoder: Decoder, files: WeightFiles, own: str, source: Source, dtype: torch.dtype
) -> Tensor:
    """Return the stored value of a parameter, in its shape; decays and skips in float32."""
    value = _take(files, source).reshape(decoder.get_parameter(own).shape)
    return value.to(torch.float32 if own.rpartition(".")[2] in KEPT_WIDE else dtype)


def place(decoder: Decoder, own: str, value: Tensor) -> None:
    """Make `value` itself, not a copy, the parameter called `own`."""
    module, _, leaf = own.rpartition(".")
    setattr(decoder.get_submodule(module), leaf, nn.Parameter(value))


def _check_dtypes(files: WeightFiles) -> None:
    for name, shape in files.shapes.items():
        if files.dtype(name) not in DTYPES.values():
            raise CheckpointError(
                f"{files.path(name)}: {shown(name)} is {files.dtype(name)}, but weights are read "
                f"from {', '.join(DTYPES)} only; save the model unquantised, in one of these"
            )
        if 0 in shape:
            raise CheckpointError(
                f"{files.path(name)}: {shown(name)} has no values (its shape is "
                f"{shown_shape(shape)}); was it written by an interrupted or a sharded run?"
            )


def check_scale(config: JambaConfig, shapes: Mapping[str, Shape], folder: Path) -> None:
    """Refuse a config for which the stored tensors are far too few."""
    # A config may claim a million layers for a file of ten tensors: no module is built for those.
    experts = config.num_experts if config.num_experts > 1 else 0
    if config.num_layers * (1 + experts) > 1000 + 8 * len(shapes):
        clues = diagnosis.find_clues(config, shapes)
        raise CheckpointError(
            f"{str(folder)!r} holds {len(shapes)} weights, far too few for its config.json "
            f"({config.num_layers} layers, {config.num_experts} experts): {'; '.join(clues)}"
        )


def _drop_tied_head(
    config: JambaConfig, files: WeightFiles, sources: dict[str, list[Source]]
) -> None:
    # Some writers store the head of a tied model too. It is only harmless if it is the embedding.
    head, embedding = sources.get("lm_head.weight"), sources.get("model.embed_tokens.weight")
    if not config.tie_embeddings or not head or not embedding:
        return
    if not torch.equal(_take(files, head[0]), _take(files, embedding[0])):
        raise CheckpointError(
            f"{files.path(head[0].tensor)}: lm_head.weight differs from model.embed_tokens.weight, "
            "but tie_word_embeddings is true in config.json; should it be false?"
        )
    del sources["lm_head.weight"]


def _compare(
    needed: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    sources: Mapping[str, list[Source]],
) -> Mismatch:
    return Mismatch(
        missing=[name for name in needed if name not in sources],
        left_over=[found[0].tensor for name, found in sources.items() if name not in needed],
        wrong_shape={
            name: (shapes[name], shape)
            for name, shape in needed.items()
            if name in sources and shapes[name] != shape
        },
        clashing={
            name: [source.tensor for source in found]
            for name, found in sources.items()
            if len(found) > 1
        },
    )


def prevalent_dtype(files: WeightFiles) -> torch.dtype:
    """Return the type that most of the stored values have, decays and skips apart."""
    values: Counter[torch.dtype] = Counter()
    for name, shape in files.shapes.items():
        if not name.endswith((".A_log", ".D")):
            values[files.dtype(name)] += torch.Size(shape).numel()
    if len(values) > 1:
        logger.info("mixed types are stored (%s): all are read as the first", values.most_common())
    return values.most_common(1)[0][0]


def _take(files: WeightFiles, source: Source) -> Tensor:
    value = files.tensor(source.tensor)
    if source.expert is not None:
        value = value[source.expert]
    return value if source.rows is None else value[slice(*source.rows)]


def write_decoder(
    folder: str | Path,
    config: JambaConfig,
    weights: Decoder | Mapping[str, Tensor],
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint folder that transformers, vLLM and llama.cpp read; whole or not at all.

    Decays (A_log) and skips (D) are stored in float32 whatever the dtype, so that reading gives
    back exactly what was written.

    Args:
        folder: where to; made with its parents. Beside a checkpoint that is overwritten, files
            that are not weights or configs (a tokenizer) are kept.
        config: what the weights are of.
        weights: a decoder, or a mapping from the decoder's own parameter names, which is asked
            for one tensor at a time, when that tensor is written.
        dtype: type to store; None stores each weight in its own.
        shard_bytes: largest file, in bytes of weights, unless one tensor alone is larger.
        overwrite: replace a checkpoint that is already in `folder`.
        progress: called with bytes written and bytes in all.

    Returns:
        The bytes of all weights.

    Raises:
        InputError: the folder may not be written, or an option is impossible.
        CheckpointError: `weights` is not of `config`.
        CapacityError: the disk has too little free space.
    """
    stored_dtype = None if dtype is None else as_dtype(dtype)
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}: expected a positive number of bytes")
    check_target(folder, overwrite=overwrite)
    if isinstance(weights, Decoder):
        weights = dict(weights.named_parameters())
    shapes = _shapes_to_write(config, weights)

    def type_of(own: str) -> torch.dtype:
        if own.rpartition(".")[2] in KEPT_WIDE:
            return torch.float32
        return stored_dtype or as_dtype(weights[own].dtype)

    dtypes = {own: type_of(own) for own in shapes}
    sizes = {own: shape.numel() * dtypes[own].itemsize for own, shape in shapes.items()}
    shards = plan_shards(sizes, dtypes, shard_bytes)
    total = sum(sizes.values())
    check_room(Path(folder), total)
    written = 0

    def values(names: list[str]) -> Iterator[Tensor]:
        nonlocal written
        for own in names:
            value = weights[own].detach()
            if value.is_meta or value.shape != shapes[own]:
                raise CheckpointError(
                    f"{own} has shape {list(value.shape)} on {value.device}: expected values of "
                    f"shape {list(shapes[own])}"
                )
            yield value.to(dtypes[own]).reshape(public_shape(own, shapes[own]))
            written += sizes[own]
            if progress is not None:
                progress(written, total)

    with appearing_whole(folder, replaces=is_ours, overwrite=overwrite) as partial:
        for file_name, names in shards.items():
            specs = [(public_name(n), dtypes[n], public_shape(n, shapes[n])) for n in names]
            write_tensor_stream(partial / file_name, specs, values(names), {"format": "pt"})
        if len(shards) > 1:
            write_index(
                partial,
                {file: [public_name(own) for own in names] for file, names in shards.items()},
                total,
            )
        torch_name = str(dtypes["embedding.weight"]).removeprefix("torch.")
        write_json(partial / "config.json", {**config.to_hf(), "dtype": torch_name})
        write_json(partial / "generation_config.json", generation_config(config))
    return total


def _shapes_to_write(config: JambaConfig, weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        blank = Decoder(config)
    shapes = {own: parameter.shape for own, parameter in blank.named_parameters()}
    # A set, as asking a mapping whether it holds a name may make it compute the value.
    given = set(weights)
    mismatch = Mismatch(
        missing=[own for own in shapes if own not in given],
        left_over=sorted(given - shapes.keys()),
    )
    if mismatch:
        raise CheckpointError(f"the weights are not those of the config: {mismatch.describe()}")
    return shapes


def check_room(folder: Path, needed: int) -> None:
    """Refuse to write more than there is room for.

    Raises:
        CapacityError: the disk of `folder` has too little free space.
    """
    above = folder.resolve()
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if needed > free:
        raise CapacityError(
            f"the weights need {needed:,} bytes and {str(above)!r} has {free:,} free: "
            "make room, or choose another folder or a smaller dtype"
        )


def generation_config(config: JambaConfig) -> dict[str, object]:
    """Return the content of a `generation_config.json`."""
    stops = list(config.eos_ids)
    ids = {
        "bos_token_id": config.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad_id,
    }
    return {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}
