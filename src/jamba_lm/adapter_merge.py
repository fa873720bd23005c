"""An adapter merged into its model: weights and tokenizer together, streamed.

Knows files; what an adapter does to a weight is `checkpoint/adapter.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from jamba_lm.checkpoint.adapter import MergedWeights
from jamba_lm.checkpoint.adapter_reader import read_adapter
from jamba_lm.checkpoint.folder import appearing_whole, check_target
from jamba_lm.checkpoint.gguf_config import read_config
from jamba_lm.checkpoint.gguf_reader import GgufWeights
from jamba_lm.checkpoint.huggingface import write_decoder
from jamba_lm.checkpoint.packed_reader import refuse_packed
from jamba_lm.checkpoint.stored_weights import open_weights
from jamba_lm.checkpoint.weight_layout import is_ours
from jamba_lm.config import JambaConfig
from jamba_lm.gguf_file import is_gguf
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.text.tokenizer_copy import COPIED, copy_tokenizer_files

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of a merge.

    Attributes:
        changed: weights that the adapter changed.
        replaced: weights that it took the place of.
        num_bytes: bytes of all weights that were written.
    """

    changed: int
    replaced: int
    num_bytes: int


def merge_adapter(
    source: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write a model with an adapter added to its weights, as a folder in Hugging Face's layout.

    Sums are taken in float32 and rounded once to the type in which a weight is stored, one tensor
    at a time.

    Args:
        source: a checkpoint folder that is not quantised, or a GGUF file.
        adapter: a folder in PEFT's format.
        target: the folder to write.
        overwrite: replace a checkpoint that is already there.
        progress: called with the bytes of weights written, and in all.

    Raises:
        CheckpointError: no sound checkpoint or adapter, or they do not belong together.
        ConfigError: config.json is not a possible Jamba config.
        InputError: the checkpoint is quantised, or the target may not be written.
        CapacityError: the disk has too little free space.
    """
    check_target(target, overwrite=overwrite)
    path = Path(source)

    def replaces(name: str) -> bool:
        return is_ours(name) or name in COPIED

    with _weights_of(path) as (config, weights):
        found = read_adapter(adapter, config)
        merged = MergedWeights(weights, found)
        with appearing_whole(target, replaces=replaces, overwrite=overwrite) as partial:
            num_bytes = write_decoder(partial, config, merged, progress=progress)
            copy_tokenizer_files(path, partial)
    return Merged(len(found.changes), len(found.replaced), num_bytes)


def config_of(path: Path) -> JambaConfig:
    """Return what the model at `path`, a folder or a GGUF file, is."""
    return read_config(open_gguf(path)) if is_gguf(path) else JambaConfig.load(path)


@contextmanager
def _weights_of(path: Path) -> Iterator[tuple[JambaConfig, Mapping[str, Tensor]]]:
    if is_gguf(path):
        weights = GgufWeights(open_gguf(path))
        yield weights.config, weights
        return
    if path.is_dir():
        refuse_packed(path, "so an adapter cannot be merged into it")
    with open_weights(path) as (config, stored):
        yield config, stored
