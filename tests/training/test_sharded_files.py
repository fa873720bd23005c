"""Boxes of tensors come back as they were written, however the reader divides them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import CheckpointError
from jamba_lm.training.places import Place
from jamba_lm.training.sharded_files import (
    INDEX,
    part_name,
    part_of,
    read_index,
    write_index,
    write_part,
)

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
divisions = st.lists(st.integers(1, 4), min_size=3, max_size=3)


def boxes(shape: tuple[int, ...], counts: list[int]) -> list[Place]:
    """Divide a tensor along every axis."""
    found = []
    for numbers in product(*(range(count) for count in counts[: len(shape)])):
        place = Place.whole(shape)
        for axis, number in enumerate(numbers):
            place = place.divided(axis, counts[axis], number)
        found.append(place)
    return found


def written(folder: Path, tensor: torch.Tensor, places: list[Place]) -> Path:
    folder.mkdir()
    for number, place in enumerate(places):
        held = {"here": place.cut_from(tensor).contiguous()} if place.num_values else {}
        write_part(folder, number, len(places), held, {"here": ("x", place)})
    write_index(folder, len(places), {"data": "none"})
    return folder


@given(shapes, divisions, divisions)
def test_any_division_is_read_by_any_other(tmp_path_factory, shape, theirs, ours):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    folder = written(tmp_path_factory.mktemp("any") / "x", tensor, boxes(shape, theirs))
    metadata, stored = read_index(folder)
    assert metadata == {"data": "none"}
    assert dict(stored.shapes) == {"x": shape}
    assert torch.equal(stored["x"], tensor)
    for place in boxes(shape, ours):
        assert torch.equal(stored.part("x", place), place.cut_from(tensor))
        assert torch.equal(part_of({"x": tensor}, "x", place), place.cut_from(tensor))


@given(shapes, divisions)
def test_boxes_of_a_division_fill_a_tensor_once(shape, counts):
    filled = torch.zeros(shape)
    for place in boxes(shape, counts):
        assert place.fits
        place.cut_from(filled).add_(1)
    assert torch.equal(filled, torch.ones(shape))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensor = torch.arange(24.0).view(6, 4)
    return written(tmp_path / "x", tensor, boxes((6, 4), [2, 1]))


def test_a_missing_part_is_named(folder):
    (folder / part_name(1, 2)).unlink()
    with pytest.raises(CheckpointError, match=r"part-00001-of-00002.*is missing, one of 2 parts"):
        read_index(folder)


def test_a_part_that_was_cut_short_is_named(folder):
    path = folder / part_name(0, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"part-00000-of-00002.*was written with"):
        read_index(folder)


def test_a_part_that_nobody_sees_is_not_indexed(folder):
    (folder / part_name(1, 2)).unlink()
    with pytest.raises(CheckpointError, match="a folder that all machines share"):
        write_index(folder, 2, {})


def test_parts_of_two_checkpoints_are_no_checkpoint(folder, tmp_path):
    other = written(tmp_path / "y", torch.arange(24.0).view(6, 4), boxes((6, 4), [3, 1]))
    part = (other / part_name(1, 3)).read_bytes()
    (folder / part_name(1, 2)).write_bytes(part)
    index = json.loads((folder / INDEX).read_text())
    index["parts"][part_name(1, 2)] = len(part)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="hold 20 of the 24 values"):
        read_index(folder)


def test_parts_that_overlap_are_no_checkpoint(folder, tmp_path):
    """As many values as there should be, but some of them twice."""
    first = Place.whole((6, 4)).divided(0, 2, 0)
    write_part(folder, 1, 2, {"here": torch.zeros(3, 4)}, {"here": ("x", first)})
    write_index(folder, 2, {})
    _, stored = read_index(folder)
    with pytest.raises(CheckpointError, match="overlap"):
        stored["x"]


@given(st.dictionaries(st.sampled_from(["format", "parts", "metadata"]), st.none() | st.text()))
def test_an_edited_index_is_refused(tmp_path_factory, changes):
    if not changes:
        return
    folder = tmp_path_factory.mktemp("edited")
    index = {"format": "jamba_lm training in parts 1", "parts": {"a": 1}, "metadata": {}}
    (folder / INDEX).write_text(json.dumps(index | changes))
    with pytest.raises(CheckpointError):
        read_index(folder)


def test_no_part_lies_outside_of_its_folder(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder.parent / "secret.safetensors").write_bytes((folder / part_name(0, 2)).read_bytes())
    index["parts"] = {"../secret.safetensors": 1}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing"):
        read_index(folder)
