"""Random checkpoints are the same for the same seed, and are what training starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.checkpoint.huggingface import read_decoder
from jamba_lm.checkpoint.random_init import InitialWeights, write_random_checkpoint
from jamba_lm.errors import InputError
from jamba_lm.language_model import from_config
from tests.checkpoint.folders import TINY, WEIGHTS, same_weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_random_checkpoint_is_a_model_made_in_memory(tmp_path: Path, dtype: str):
    write_random_checkpoint(tmp_path, TINY, dtype=dtype, seed=7)
    config, decoder = read_decoder(tmp_path)
    assert config == TINY
    assert same_weights(decoder, from_config(TINY, seed=7, dtype=dtype).decoder)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path):
    for name, seed in [("one", 1), ("again", 1), ("two", 2)]:
        write_random_checkpoint(tmp_path / name, TINY, seed=seed)
    one, again, two = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("one", "again", "two"))
    assert one == again
    assert one != two


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bytes_are_those_that_planning_says(tmp_path: Path, dtype: str):
    written = write_random_checkpoint(tmp_path, TINY, dtype=dtype)
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / WEIGHTS).values())
    assert written == stored == weight_bytes(TINY, dtype)


def test_every_tensor_is_made_once_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    make = InitialWeights.__getitem__

    def count(self: InitialWeights, own: str) -> object:
        made.append(own)
        return make(self, own)

    monkeypatch.setattr(InitialWeights, "__getitem__", count)
    write_random_checkpoint(tmp_path, TINY, shard_bytes=3000)
    assert len(made) == len(set(made)) == len(load_file_names(tmp_path))


def load_file_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_progress_ends_with_all_bytes(tmp_path: Path):
    heard: list[tuple[int, int]] = []
    total = write_random_checkpoint(
        tmp_path, TINY, progress=lambda done, of: heard.append((done, of))
    )
    assert heard == sorted(heard)
    assert heard[-1] == (total, total)


def test_an_unknown_type_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        write_random_checkpoint(tmp_path / "x", TINY, dtype="int8")
    assert list(tmp_path.iterdir()) == []
