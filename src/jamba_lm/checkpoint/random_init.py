"""Random checkpoints of any shape, for benchmarks and tests, larger than memory if need be.

Knows how to write, tensor by tensor; what the values are is `model/initialization`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.huggingface import SHARD_BYTES, Progress, as_dtype, write_decoder
from jamba_lm.config import JambaConfig
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initial_value


class InitialWeights(Mapping[str, Tensor]):
    """The parameters of a model that starts from nothing, each made when it is asked for."""

    def __init__(self, config: JambaConfig, dtype: torch.dtype, seed: int) -> None:
        self._config, self._dtype, self._seed = config, dtype, seed
        with torch.device("meta"):
            blank = Decoder(config)
        self._shapes = {own: tuple(p.shape) for own, p in blank.named_parameters()}

    def __getitem__(self, own: str) -> Tensor:
        shape = self._shapes[own]
        return initial_value(self._config, own, shape, self._dtype, self._seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_random_checkpoint(
    folder: str | Path,
    config: JambaConfig,
    *,
    dtype: str | torch.dtype = "bf16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint with the weights that training from scratch would start from.

    Only one tensor is in memory at a time. The same config, dtype and seed give the same bytes.

    Args:
        folder: where to, as in `write_decoder`.
        config: the shape of the model.
        dtype: type to store, "fp32", "bf16" or "fp16".
        seed: of every draw.
        shard_bytes: as in `write_decoder`.
        overwrite: as in `write_decoder`.
        progress: as in `write_decoder`.

    Returns:
        The bytes of all weights.

    Raises:
        InputError: the folder may not be written, or an option is impossible.
        CapacityError: the disk has too little free space.
    """
    stored = as_dtype(dtype)
    return write_decoder(
        folder,
        config,
        InitialWeights(config, stored, seed),
        dtype=stored,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
