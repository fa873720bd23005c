"""A GGUF model in several files is read as one, or refused with the name of what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jamba_lm.checkpoint.gguf_config import load_gguf_config
from jamba_lm.cli.main import main
from jamba_lm.conversion import folder_to_gguf, gguf_to_folder
from jamba_lm.errors import CheckpointError
from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.language_model import load
from jamba_lm.text.tokenizer import load_tokenizer
from tests.checkpoint.gguf_editing import Tensors, Values, edit
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_tiny_checkpoint(folder / "folder")
    folder_to_gguf(folder / "folder", folder / "whole.gguf", file_type="f32")
    return folder / "whole.gguf"


def split(whole: Path, folder: Path, count: int = 3) -> list[Path]:
    """Divide a file as `llama-gguf-split` does: the first part has the header."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(GgufFile(whole).tensors)
    paths = [folder / f"m-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):

        def change(values: Values, tensors: Tensors, number: int = number) -> None:
            if number:
                values.clear()
            values["split.no"] = ("uint16", number)
            values["split.count"] = ("uint16", count)
            values["split.tensors.count"] = ("int32", len(names))
            for place, name in enumerate(names):
                if place * count // len(names) != number:
                    del tensors[name]

        shutil.copy(whole, path)
        edit(path, change)
    return paths


@pytest.mark.parametrize("count", [2, 3, 11])
def test_parts_are_read_as_the_whole(tmp_path, whole, count):
    first = split(whole, tmp_path, count)[0]
    one, many = GgufFile(whole), open_gguf(first)
    assert list(many.tensors) == list(one.tensors)
    assert all(bytes(many.view(name)) == bytes(one.view(name)) for name in one.tensors)
    assert load_gguf_config(first) == load_gguf_config(whole)
    assert load(first).fingerprint == load(whole).fingerprint
    assert load_tokenizer(first).encode("and so on") == load_tokenizer(whole).encode("and so on")
    gguf_to_folder(first, tmp_path / "out")
    assert load(tmp_path / "out").fingerprint == load(whole).fingerprint


def test_a_file_that_says_it_is_the_only_part_is_read(tmp_path, whole):
    path = Path(shutil.copy(whole, tmp_path / "x.gguf"))
    edit(path, lambda values, _: values.update({"split.count": ("uint16", 1)}))
    assert load(path).fingerprint == load(whole).fingerprint


def without(numbers: set[int]):
    return lambda paths: [paths[number].unlink() for number in numbers]


def renamed(paths: list[Path]) -> None:
    paths[0].rename(paths[0].with_name("model.gguf"))


def says(number: int, key: str, kind: str, value: object):
    return lambda paths: edit(paths[number], lambda values, _: values.update({key: (kind, value)}))


def doubled(paths: list[Path]) -> None:
    extra = GgufFile(paths[0])
    name, place = next(iter(extra.tensors.items()))
    tensor = (place.kind.name, place.shape, bytes(extra.view(name)))
    edit(paths[2], lambda _, tensors: tensors.update({name: tensor}))


def cut(paths: list[Path]) -> None:
    paths[1].write_bytes(paths[1].read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "opened", "words"),
    [
        (without({1}), 0, "there is no m-00002-of-00003.gguf: get all parts"),
        (without({1, 2}), 0, "no m-00002-of-00003.gguf, m-00003-of-00003.gguf: get"),
        (lambda _: None, 1, "not the first part of 3: open m-00001-of-00003.gguf"),
        (renamed, "model.gguf", "expected one that ends in -00001-of-00003.gguf"),
        (says(2, "split.no", "uint16", 1), 0, "does not say that it is part 3 of 3"),
        (says(1, "split.count", "uint16", 4), 0, "does not say that it is part 2 of 3"),
        (says(0, "split.count", "uint32", 2**31), 0, "split.count is 2147483648"),
        (says(0, "split.count", "string", "3"), 0, "split.count is string, expected a whole"),
        (says(0, "split.tensors.count", "int32", 7), 0, "is 7, but the 3 parts hold"),
        (doubled, 0, "is in m-00001-of-00003.gguf as well"),
        (cut, 0, "m-00002-of-00003.gguf' is not a sound GGUF file"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(tmp_path, whole, spoil, opened, words):
    paths = split(whole, tmp_path)
    spoil(paths)
    path = tmp_path / opened if isinstance(opened, str) else paths[opened]
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_one_line_on_the_command_line(tmp_path, whole, capsys):
    paths = split(whole, tmp_path)
    paths[2].unlink()
    for command in ("inspect", "plan", "generate"):
        more = ["--prompt", "a"] if command == "generate" else []
        assert main([command, str(paths[0]), *more]) == 2
        assert "there is no m-00003-of-00003.gguf" in capsys.readouterr().err
