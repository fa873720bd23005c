"""The weights of a checkpoint folder as they are stored, for whoever rewrites them.

Nothing is converted and nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from jamba_lm.checkpoint.huggingface import find_parameters, open_checkpoint, read_parameter
from jamba_lm.checkpoint.rename import Source
from jamba_lm.checkpoint.shards import WeightFiles
from jamba_lm.config import JambaConfig
from jamba_lm.model.decoder import Decoder


@contextmanager
def open_weights(folder: str | Path) -> Iterator[tuple[JambaConfig, StoredWeights]]:
    """Give the config of a checkpoint folder, and its weights.

    Raises:
        CheckpointError: as in `read_decoder`.
        ConfigError: config.json is not a possible Jamba config.
    """
    with open_checkpoint(folder) as (config, files):
        yield config, StoredWeights(files, *find_parameters(config, files, Path(folder)))


class StoredWeights(Mapping[str, Tensor]):
    """Weights under the decoder's own names, each in the memory map and in its stored type.

    Decays and skips come in float32, as everywhere.
    """

    def __init__(self, files: WeightFiles, decoder: Decoder, sources: Mapping[str, Source]) -> None:
        self._files, self._decoder, self._sources = files, decoder, sources

    def __getitem__(self, own: str) -> Tensor:
        source = self._sources[own]
        stored = self._files.dtype(source.tensor)
        return read_parameter(self._decoder, self._files, own, source, stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
