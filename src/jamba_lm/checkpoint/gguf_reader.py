"""Jamba models out of GGUF files: llama.cpp's own, of any type, and ours.

Every tensor is used and every parameter filled, or the file is refused. The file is mapped: plain
values in the type asked for are not copied, all others are decoded one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.diagnosis import Mismatch
from jamba_lm.checkpoint.gguf_blocks import decode
from jamba_lm.checkpoint.gguf_config import read_config
from jamba_lm.checkpoint.gguf_names import DECAY, place_of, stacked_shapes
from jamba_lm.checkpoint.gguf_storage import loaded_format
from jamba_lm.checkpoint.huggingface import as_dtype, place
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError
from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import KEPT_WIDE


class GgufWeights(Mapping[str, Tensor]):
    """The parameters of a GGUF file under the decoder's own names, each decoded when asked for.

    Attributes:
        config: what the weights are of.
        dtype: what parameters come in, but for those that are float32 in every model.
    """

    def __init__(self, file: GgufFile, dtype: str | torch.dtype = "auto") -> None:
        """Check that the tensors of `file` are exactly those of its model.

        Args:
            file: an open file.
            dtype: "fp32", "bf16", "fp16", a torch dtype, or "auto": the type that most values
                have, and bfloat16 for a file of quantised ones.

        Raises:
            CheckpointError: not a Jamba model; or tensors are missing, left over or of the wrong
                shape: one message lists them.
            InputError: no such `dtype`.
        """
        self._file = file
        self.config = read_config(file)
        self.dtype = as_dtype(loaded_format(file) if dtype == "auto" else dtype)
        _check_scale(self.config, file)
        with torch.device("meta"):
            blank = Decoder(self.config)
        self._shapes = {own: tuple(p.shape) for own, p in blank.named_parameters()}
        needed = stacked_shapes(self._shapes.items())
        stored = {name: found.shape for name, found in file.tensors.items()}
        mismatch = Mismatch(
            missing=[name for name in needed if name not in stored],
            left_over=[name for name in stored if name not in needed],
            wrong_shape={
                name: (stored[name], shape)
                for name, shape in needed.items()
                if name in stored and stored[name] != shape
            },
        )
        if mismatch:
            raise CheckpointError(
                f"the tensors of {str(file.path)!r} are not those of its header's Jamba model: "
                f"{mismatch.describe()}"
            )

    def __getitem__(self, own: str) -> Tensor:
        """Return one parameter; it shares the file's memory where no value has to be changed.

        Raises:
            CheckpointError: a decay that is not negative.
            CheckpointError: a quantised type, and the package `gguf` is missing.
        """
        shape, where = self._shapes[own], place_of(own)
        found = self._file.tensors[where.tensor]
        data = self._file.view(where.tensor)
        if where.expert is not None:
            size = found.size // found.shape[0]
            data = data[where.expert * size : (where.expert + 1) * size]
        wide = own.rpartition(".")[2] in KEPT_WIDE
        value = decode(data, found.kind, shape, torch.float32 if wide else self.dtype)
        return self._log_decay(value, where.tensor) if where.tensor.endswith(DECAY) else value

    def _log_decay(self, decay_CN: Tensor, name: str) -> Tensor:
        if not (torch.isfinite(decay_CN) & (decay_CN < 0)).all():
            raise CheckpointError(
                f"{str(self._file.path)!r}: {name} holds {float(decay_CN.max()):.4g}, but a decay "
                "is a negative number (-exp(A_log)); was the file made by an old converter?"
            )
        # In float64, so that a decay that came out of a float32 A_log goes back to it.
        return torch.log(-decay_CN.double()).float()

    @property
    def num_values(self) -> int:
        """The number of parameters."""
        return sum(map(prod, self._shapes.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def read_gguf_decoder(
    path: str | Path, dtype: str | torch.dtype = "auto"
) -> tuple[JambaConfig, Decoder]:
    """Read the config and the weights of a GGUF file.

    Args:
        path: the file.
        dtype: as for `GgufWeights`.

    Raises:
        CheckpointError: as for `GgufFile` and `GgufWeights`.
        InputError: no such `dtype`.
        CheckpointError: a quantised type, and the package `gguf` is missing.
    """
    weights = GgufWeights(open_gguf(path), dtype)
    with torch.device("meta"):
        decoder = Decoder(weights.config)
    for own in weights:
        place(decoder, own, weights[own])
    return weights.config, decoder


def _check_scale(config: JambaConfig, file: GgufFile) -> None:
    # A header may claim any number of experts: no module is built for those.
    claimed = config.num_layers * config.num_experts
    held = sum(found.shape[0] for found in file.tensors.values() if len(found.shape) == 3)
    if config.num_experts > 1 and claimed > 1000 + 8 * held:
        raise CheckpointError(
            f"{str(file.path)!r} claims {config.num_experts} experts in {config.num_layers} "
            f"layers, but its stacks hold {held} matrices in all"
        )
