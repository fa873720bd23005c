"""Quantised checkpoint folders read: packed matrices in their memory map, the rest as it is.

The folder is this project's own, so nothing is guessed: every tensor has its one name, type and
shape, or the folder is refused. Also packs an ordinary folder while it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.adapter import Adapter
from jamba_lm.checkpoint.diagnosis import Mismatch, shown, shown_shape
from jamba_lm.checkpoint.huggingface import (
    DTYPES,
    as_dtype,
    check_scale,
    find_parameters,
    place,
    prevalent_dtype,
    read_parameter,
)
from jamba_lm.checkpoint.rename import Shape, public_name, public_shape
from jamba_lm.checkpoint.shards import WeightFiles
from jamba_lm.config import JambaConfig, read_config_json
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.kernels.packed_weights import Int4Weight, Int8Weight, PackedWeight
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import KEPT_WIDE
from jamba_lm.quantization.policy import Packing, Scheme, read_scheme
from jamba_lm.quantization.rewrite import Progress, place_packed, quantize_weight

# An ordinary checkpoint's map is given up after this much of it was read, so that the system can
# have its pages back while a model larger than memory is packed.
READ_BETWEEN_MAPS = 1 << 28


def stored_scheme(folder: str | Path) -> Scheme | None:
    """Return the scheme that the weights of a checkpoint folder were packed with, if any.

    Raises:
        CheckpointError: config.json says something about it that this version does not know.
        ConfigError: there is no config.json, or it is damaged.
    """
    return read_scheme(read_config_json(folder), str(Path(folder) / "config.json"))


def read_packed_decoder(
    folder: Path, config: JambaConfig, scheme: Scheme, dtype: str | torch.dtype = "auto"
) -> Decoder:
    """Read a folder that `packed_writer` wrote. Packed matrices stay in the file's memory map.

    Args:
        folder: the checkpoint.
        config: from its config.json.
        scheme: likewise.
        dtype: of what is not packed, and of the activations; "auto" keeps the stored one.

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong type or shape, or has a scale
            that is not finite.
        InputError: no such `dtype`.
    """
    wanted = None if dtype == "auto" else as_dtype(dtype)
    with WeightFiles.open(folder) as files:
        check_scale(config, files.shapes, folder)
        with torch.device("meta"):
            decoder = Decoder(config)
        shapes = {own: tuple(p.shape) for own, p in decoder.named_parameters()}
        packings = {own: scheme.packing(own, shape) for own, shape in shapes.items()}
        _check_tensors(files, folder, shapes, packings)
        plain = [own for own, packing in packings.items() if packing is None]
        if wanted is None:
            wanted = _plain_dtype(files, plain, shapes)
        for own in plain:
            value = files.tensor(public_name(own)).reshape(shapes[own])
            kept = torch.float32 if own.rpartition(".")[2] in KEPT_WIDE else wanted
            place(decoder, own, value.to(kept))
        for own, packing in packings.items():
            if packing is not None:
                packed = _read_packed(files, own, packing, shapes[own])
                place_packed(decoder, own, packed, wanted, rows8=scheme.rounds_rows(own))
    return decoder


def pack_while_reading(
    folder: Path,
    config: JambaConfig,
    scheme: Scheme,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    adapter: Adapter | None = None,
) -> Decoder:
    """Read an ordinary checkpoint folder into a quantised decoder, one tensor at a time.

    Memory never holds more than the result, one of the original matrices, and a part of the file
    that the system may drop.

    Args:
        folder: a checkpoint that is not quantised.
        config: from its config.json.
        scheme: what to pack, and how.
        dtype: as in `read_packed_decoder`.
        progress: called with the parameters read, in values, and all of them.
        adapter: added to each weight before that is packed.

    Raises:
        CheckpointError: the folder cannot be read, or a matrix holds NaN or infinity.
        InputError: no such `dtype`.
    """
    weights = StreamedWeights(folder, config, None if dtype == "auto" else as_dtype(dtype))
    decoder = weights.blank
    done, total = 0, sum(weights.num_values(own) for own in weights)
    for own in list(weights):
        value = weights[own] if adapter is None else adapter.merged(own, weights[own])
        packing = scheme.packing(own, value.shape)
        if packing is None:
            # A copy: one tensor that stays in the map would keep all of it.
            place(decoder, own, value.clone())
        else:
            packed = quantize_weight(own, value, packing)
            place_packed(decoder, own, packed, weights.dtype, rows8=scheme.rounds_rows(own))
        done += value.numel()
        if progress is not None:
            progress(done, total)
    return decoder


class StreamedWeights(Mapping[str, Tensor]):
    """The parameters of an ordinary checkpoint by the decoder's names, each read when asked for.

    Attributes:
        blank: a decoder of the right shape without values.
        dtype: of all values but decays and skips.
    """

    def __init__(self, folder: Path, config: JambaConfig, dtype: torch.dtype | None) -> None:
        """Open a folder and check it as reading it whole does.

        Raises:
            CheckpointError: the folder cannot be read, or does not fit its config.
        """
        self._folder = folder
        self._files = WeightFiles.open(folder)
        self._read = 0
        self.blank, self._sources = find_parameters(config, self._files, folder)
        self._shapes = {own: tuple(p.shape) for own, p in self.blank.named_parameters()}
        self.dtype = prevalent_dtype(self._files) if dtype is None else dtype

    def __getitem__(self, own: str) -> Tensor:
        if self._read > READ_BETWEEN_MAPS:
            self._files = WeightFiles.open(self._folder)
            self._read = 0
        source = self._sources[own]
        value = read_parameter(self.blank, self._files, own, source, self.dtype)
        self._read += value.nbytes
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def num_values(self, own: str) -> int:
        """Return how many values a parameter has, without reading it."""
        return torch.Size(self._shapes[own]).numel()


def refuse_packed(folder: str | Path, wanted: str) -> None:
    """Refuse to do with a quantised folder what needs the original.

    Raises:
        InputError: the folder is quantised.
    """
    scheme = stored_scheme(folder)
    if scheme is not None:
        raise InputError(
            f"{str(folder)!r} is quantised already ({scheme.name}), {wanted}: take the original "
            "checkpoint, since rounding twice loses more"
        )


def _check_tensors(
    files: WeightFiles,
    folder: Path,
    shapes: Mapping[str, Shape],
    packings: Mapping[str, Packing | None],
) -> None:
    needed: dict[str, tuple[str | None, Shape]] = {}
    for own, shape in shapes.items():
        packing, public = packings[own], public_name(own)
        if packing is None:
            needed[public] = None, public_shape(own, shape)
        else:
            needed |= {f"{public}.{part}": one for part, one in packing.parts(shape).items()}
    stored = files.shapes
    mismatch = Mismatch(
        missing=[name for name in needed if name not in stored],
        left_over=[name for name in stored if name not in needed],
        wrong_shape={
            name: (stored[name], shape)
            for name, (_, shape) in needed.items()
            if name in stored and stored[name] != shape
        },
    )
    if mismatch:
        raise CheckpointError(
            f"the quantised weights in {str(folder)!r} do not fit its config.json; "
            f"{mismatch.describe()}"
        )
    for name, (wanted, _) in needed.items():
        found = str(files.dtype(name)).removeprefix("torch.")
        if wanted is None and files.dtype(name) not in DTYPES.values():
            raise CheckpointError(
                f"{files.path(name)}: {shown(name)} is {found}, expected one of {', '.join(DTYPES)}"
            )
        if wanted is not None and found != wanted:
            raise CheckpointError(
                f"{files.path(name)}: {shown(name)} is {found} of shape "
                f"{shown_shape(stored[name])}, expected {wanted}; write the folder again"
            )


def _plain_dtype(files: WeightFiles, plain: list[str], shapes: Mapping[str, Shape]) -> torch.dtype:
    values: Counter[torch.dtype] = Counter()
    for own in plain:
        if own.rpartition(".")[2] not in KEPT_WIDE:
            values[files.dtype(public_name(own))] += torch.Size(shapes[own]).numel()
    return values.most_common(1)[0][0]


def _read_packed(files: WeightFiles, own: str, packing: Packing, shape: Shape) -> PackedWeight:
    public = public_name(own)
    parts = {part: files.tensor(f"{public}.{part}") for part in packing.parts(shape)}
    for part in parts.keys() - {"values", "packed"}:
        low, high = torch.aminmax(parts[part])
        if not torch.isfinite(low) or not torch.isfinite(high) or (part == "scale" and low < 0):
            name = f"{public}.{part}"
            raise CheckpointError(
                f"{files.path(name)}: {shown(name)} holds values from {float(low)} to "
                f"{float(high)}, expected finite ones{', not below 0' if part == 'scale' else ''}; "
                "the file is damaged"
            )
    if packing.group is None:
        return Int8Weight(parts["values"], parts["scale"])
    return Int4Weight(parts["packed"], parts["scale"], parts["minimum"])
