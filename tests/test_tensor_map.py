"""Mapped tensors hold what the file holds, and a file that is none is said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jamba_lm.errors import CheckpointError
from jamba_lm.tensor_file import write_tensors
from jamba_lm.tensor_map import map_tensors


def test_values_types_shapes_and_places_are_those_of_the_file(tmp_path: Path):
    tensors = {
        "wide": torch.randn(3, 5),
        "narrow": torch.randn(7, 2).bfloat16(),
        "bytes": torch.arange(-4, 5, dtype=torch.int8),
        "nibbles": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "none": torch.empty(0, 4),
    }
    write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    found = map_tensors(tmp_path / "file")
    assert {name: (one.code, one.shape) for name, one in found.items()} == {
        "wide": ("F32", (3, 5)),
        "narrow": ("BF16", (7, 2)),
        "bytes": ("I8", (9,)),
        "nibbles": ("U8", (2, 3)),
        "none": ("F32", (0, 4)),
    }
    for name in ("wide", "narrow", "none"):
        assert np.array_equal(found[name].floats(), tensors[name].float().numpy())
        assert found[name].is_aligned
    assert np.array_equal(found["bytes"].data.view(np.int8), tensors["bytes"].numpy())
    assert found["nibbles"].data.tolist() == list(range(6))
    assert found["narrow"].address == found["wide"].address + 4 * 15


def test_values_between_two_places_are_seen(tmp_path: Path):
    write_tensors(tmp_path / "file", {"a": torch.zeros(3, dtype=torch.uint8)}, {})
    data = (tmp_path / "file").read_bytes()
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "BF16", "shape": [1], "data_offsets": [1, 3]},
    }
    text = json.dumps(header).encode().ljust(128)
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data[-3:])
    found = map_tensors(tmp_path / "file")
    assert found["a"].is_aligned
    assert not found["b"].is_aligned


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\xff" * 40, (4).to_bytes(8, "little") + b"{}  "]
)
def test_what_is_no_file_of_tensors_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / "file").write_bytes(data)
    if data.endswith(b"{}  "):
        assert map_tensors(tmp_path / "file") == {}
        return
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        map_tensors(tmp_path / "file")


def test_other_types_and_absent_files_are_refused(tmp_path: Path):
    write_tensors(tmp_path / "file", {"a": torch.zeros(2, dtype=torch.float16)}, {})
    with pytest.raises(CheckpointError, match="'a' is F16"):
        map_tensors(tmp_path / "file")
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        map_tensors(tmp_path / "nothing")
