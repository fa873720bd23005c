"""Safetensors files: written whole or not at all, read without copies, refused when broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jamba_lm.errors import CheckpointError, StateError
from jamba_lm.tensor_file import CODES, TensorFile, write_tensor_stream, write_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5).to(torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "strided": torch.arange(12.0).view(3, 4).T,
}


def test_the_library_of_the_format_reads_what_we_write(tmp_path: Path):
    write_tensors(tmp_path / "x", TENSORS, {"who": "me"})
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name


def test_we_read_what_the_library_of_the_format_writes(tmp_path: Path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "x", {"who": "me"})
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"who": "me"}
        assert set(file.names) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert file.shape(name) == tuple(tensor.shape)
            assert file.dtype(name) == tensor.dtype
            assert torch.equal(file.tensor(name), tensor), name


@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype):
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    write_tensors(tmp_path / "x", {"x": tensor}, {})
    with TensorFile(tmp_path / "x") as file:
        assert torch.equal(file.tensor("x"), tensor)


def test_tensors_share_the_map_and_outlive_the_file(tmp_path: Path):
    write_tensors(tmp_path / "x", {"x": torch.ones(1000), "y": torch.zeros(1000)}, {})
    with TensorFile(tmp_path / "x") as file:
        one, two = file.tensor("x"), file.tensor("x")
    assert one.data_ptr() == two.data_ptr()
    assert float(one.sum()) == 1000


def test_a_stream_makes_one_tensor_at_a_time(tmp_path: Path):
    asked: list[int] = []

    def values():
        for index in range(3):
            asked.append(index)
            yield torch.full((4,), float(index))

    specs = [(f"t{index}", torch.float32, (4,)) for index in range(3)]
    write_tensor_stream(tmp_path / "x", specs, values(), {})
    assert asked == [0, 1, 2]
    assert load_file(tmp_path / "x")["t2"].tolist() == [2.0] * 4


def test_an_interrupted_stream_leaves_nothing(tmp_path: Path):
    def values():
        yield torch.zeros(4)
        raise KeyboardInterrupt

    specs = [("a", torch.float32, (4,)), ("b", torch.float32, (4,))]
    with pytest.raises(KeyboardInterrupt):
        write_tensor_stream(tmp_path / "x", specs, values(), {})
    assert list(tmp_path.iterdir()) == []


def test_the_error_is_the_one_asked_for(tmp_path: Path):
    with pytest.raises(StateError, match="no file"):
        TensorFile(tmp_path / "absent", error=StateError)


def test_dtypes_of_no_use_here_are_named(tmp_path: Path):
    save_file({"x": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file, pytest.raises(CheckpointError, match="F8_E4M3"):
        file.tensor("x")


@settings(max_examples=300)
@given(header=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_header_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, header: bytes
):
    path = tmp_path_factory.mktemp("x") / "x"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    check(path)


@settings(max_examples=300)
@given(
    dtype=st.sampled_from(["F32", "BF16", "I8", "F7", "", "F64", "BOOL"]),
    shape=st.lists(st.integers(-3, 2**63), max_size=4),
    offsets=st.lists(st.integers(-1, 2**63), min_size=0, max_size=3),
    claimed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_any_claim_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list, offsets: list, claimed: int
):
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    size = len(header) if claimed is None else claimed
    path = tmp_path_factory.mktemp("x") / "x"
    path.write_bytes(size.to_bytes(8, "little") + header + b"\0" * 16)
    check(path)


def check(path: Path) -> None:
    try:
        with TensorFile(path) as file:
            for name in file.names:
                assert file.tensor(name).nbytes <= 16
    except CheckpointError as error:
        assert "\n" not in str(error)
