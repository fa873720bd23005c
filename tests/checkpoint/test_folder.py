"""A checkpoint folder appears whole or not at all, and nothing else is lost to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_lm.checkpoint.folder import appearing_whole
from jamba_lm.checkpoint.huggingface import read_decoder
from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.errors import InputError
from tests.checkpoint.folders import TINY, same_weights


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, OSError(28, "full")])
@pytest.mark.parametrize("after_tensors", [1, 30, 67])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, interruption: type[BaseException] | BaseException, after_tensors: int
):
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after_tensors:
            raise interruption

    kind = InputError if isinstance(interruption, OSError) else interruption
    with pytest.raises(kind):
        write_random_checkpoint(tmp_path / "deep" / "x", TINY, shard_bytes=3000, progress=interrupt)
    assert len(calls) == after_tensors
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupted_overwrite_leaves_the_old_checkpoint(tmp_path: Path):
    write_random_checkpoint(tmp_path / "x", TINY)
    before = content(tmp_path / "x")

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "x", TINY, seed=1, overwrite=True, progress=interrupt)
    assert content(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_files_that_are_not_replaced_are_kept(tmp_path: Path):
    target = tmp_path / "x"
    (target / "sub").mkdir(parents=True)
    for name in ("config.json", "old", "kept", "both", "sub/kept"):
        (target / name).write_text("before")
    with appearing_whole(target, replaces=lambda name: name == "old", overwrite=True) as partial:
        (partial / "config.json").write_text("after")
        (partial / "both").write_text("after")
    assert content(target) == {"config.json": b"after", "both": b"after", "kept": b"before"}
    assert content(target / "sub") == {"kept": b"before"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "x").mkdir()
    write_random_checkpoint(tmp_path / "x", TINY)
    assert "config.json" in content(tmp_path / "x")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path):
    write_random_checkpoint(tmp_path / "real", TINY)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_random_checkpoint(tmp_path / "link", TINY, seed=1, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    write_random_checkpoint(tmp_path / "other", TINY, seed=1)
    assert same_weights(read_decoder(tmp_path / "real")[1], read_decoder(tmp_path / "other")[1])


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(InputError, match="not empty and holds no checkpoint"):
        write_random_checkpoint(tmp_path, TINY, overwrite=True)
    assert content(tmp_path) == {"thesis.txt": b"ten years"}


def test_a_file_is_never_overwritten(tmp_path: Path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(InputError, match="is a file: expected a folder"):
        write_random_checkpoint(tmp_path / "x", TINY, overwrite=True)


def test_a_parent_that_is_a_file_is_told(tmp_path: Path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        write_random_checkpoint(tmp_path / "x" / "y", TINY)
