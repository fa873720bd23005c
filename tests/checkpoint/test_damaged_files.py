"""Whatever lies in a checkpoint folder, it is read or refused: one line, no crash, no memory."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.checkpoint.huggingface import read_decoder
from jamba_lm.errors import CheckpointError, JambaError
from tests.checkpoint.folders import INDEX, TINY, WEIGHTS, checkpoint, raw_safetensors

ROOM_BYTES = 2**30

# Large enough to be worth a lie, and every way of saying it.
SIZES = st.one_of(
    st.integers(-2, 40),
    st.integers(2**31 - 2, 2**33),
    st.integers(2**62, 2**66),
    st.floats(allow_nan=False),
    st.none(),
    st.text(max_size=3),
)
CODES = st.sampled_from(
    [
        "F64",
        "F32",
        "F16",
        "BF16",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "BOOL",
        "F8_E4M3",
        "C64",
        "X",
        "",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """Let an allocation of what a damaged header claims fail, instead of succeeding unnoticed."""
    used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = used_pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("single") / "x", TINY.replace(num_layers=3))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY.replace(num_layers=3)
    return checkpoint(tmp_path_factory.mktemp("sharded") / "x", config, shard_bytes=4000)


@pytest.fixture(scope="module")
def sound(single: Path) -> bytes:
    return (single / WEIGHTS).read_bytes()


def read_or_be_refused(folder: Path) -> bool:
    """Read a folder; a refusal must be a short line that a person can act on."""
    try:
        read_decoder(folder)
    except JambaError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert "\r" not in message
        assert len(message) < 3000
        return False
    return True


def must_be_refused(folder: Path) -> None:
    assert not read_or_be_refused(folder), "a damaged checkpoint was read"


@given(data=st.data())
@settings(max_examples=200)
def test_a_truncated_file_is_refused(single: Path, sound: bytes, data: st.DataObject):
    length = data.draw(st.integers(0, len(sound) - 1) | st.integers(0, 200))
    (single / WEIGHTS).write_bytes(sound[:length])
    must_be_refused(single)


@given(extra=st.binary(min_size=1, max_size=64))
@settings(max_examples=100)
def test_a_file_with_more_behind_it_is_refused(single: Path, sound: bytes, extra: bytes):
    (single / WEIGHTS).write_bytes(sound + extra)
    must_be_refused(single)


@given(data=st.data())
@settings(max_examples=400)
def test_altered_bytes_of_a_header_never_crash(single: Path, sound: bytes, data: st.DataObject):
    altered = bytearray(sound)
    end = 8 + struct.unpack("<Q", sound[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (single / WEIGHTS).write_bytes(altered)
    read_or_be_refused(single)


@given(data=st.data())
@settings(max_examples=300)
def test_a_tensor_that_is_described_otherwise_is_refused(
    single: Path, sound: bytes, data: st.DataObject
):
    length = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    before = json.dumps(header[name])
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    if key == "dtype":
        header[name][key] = data.draw(CODES)
    elif key == "shape":
        header[name][key] = data.draw(st.lists(SIZES, max_size=5))
    else:
        header[name][key] = data.draw(st.lists(SIZES, min_size=2, max_size=2))
    raw_safetensors(single / WEIGHTS, header, sound[8 + length :])
    if json.dumps(header[name]) != before:
        must_be_refused(single)


@given(header=JSON, data=st.binary(max_size=64))
@settings(max_examples=250)
def test_any_json_as_a_header_is_refused(single: Path, header: Any, data: bytes):
    raw_safetensors(single / WEIGHTS, header, data)
    must_be_refused(single)


@given(content=st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_as_a_file_are_refused(single: Path, content: bytes):
    (single / WEIGHTS).write_bytes(content)
    must_be_refused(single)


@pytest.mark.parametrize("claim", [2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_refused(single: Path, sound: bytes, claim: int):
    (single / WEIGHTS).write_bytes(struct.pack("<Q", claim) + sound[8:])
    must_be_refused(single)


@pytest.mark.parametrize(
    "shape", [[0, 2**62], [2**62, 0], [2**33, 2**33, 0], [0], [1] * 3000 + [0]]
)
def test_a_huge_shape_of_no_values_is_refused(single: Path, shape: list[int]):
    # The sizes multiply to nothing, so the file is consistent.
    header = {
        "model.layers.1.feed_forward.experts.gate_up_proj": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [0, 0],
        }
    }
    raw_safetensors(single / WEIGHTS, header, b"")
    must_be_refused(single)


@given(names=st.lists(st.text(max_size=40) | st.just("model.layers.999999.mamba.D"), unique=True))
@settings(max_examples=100)
def test_tensors_of_any_name_are_refused(single: Path, names: list[str]):
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
        if name.isprintable() or name.isascii()
    }
    header = {name: value for name, value in header.items() if name != "__metadata__"}
    offsets = range(0, 4 * len(header), 4)
    for value, first in zip(header.values(), offsets, strict=True):
        value["data_offsets"] = [first, first + 4]
    raw_safetensors(single / WEIGHTS, header, bytes(4 * len(header)))
    must_be_refused(single)


@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
@settings(max_examples=200)
def test_any_json_as_an_index_is_refused(sharded: Path, index: Any):
    (sharded / INDEX).write_text(json.dumps(index))
    must_be_refused(sharded)


@given(content=st.binary(max_size=200))
@settings(max_examples=150)
def test_any_bytes_as_an_index_are_refused(sharded: Path, content: bytes):
    (sharded / INDEX).write_bytes(content)
    must_be_refused(sharded)


@given(data=st.data())
@settings(max_examples=200)
def test_a_weight_map_with_anything_moved_is_refused(
    sharded_map: tuple[Path, dict[str, str]], data: st.DataObject
):
    folder, places = sharded_map
    name = data.draw(st.sampled_from(sorted(places)))
    place = data.draw(st.sampled_from(sorted(set(places.values()))) | st.text(max_size=30) | JSON)
    moved = {**places, name: place}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    if moved != places:
        must_be_refused(folder)


@pytest.fixture(scope="module")
def sharded_map(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    config = TINY.replace(num_layers=3)
    folder = checkpoint(tmp_path_factory.mktemp("map") / "x", config, shard_bytes=4000)
    return folder, json.loads((folder / INDEX).read_text())["weight_map"]


@given(data=st.data())
@settings(max_examples=120)
def test_a_config_that_claims_other_sizes_is_refused_without_building_them(
    consistent: Path, data: st.DataObject
):
    values = json.loads((consistent / "config.json").read_text())
    sizes = sorted(key for key, value in values.items() if type(value) is int)
    key = data.draw(st.sampled_from([key for key in sizes if not key.endswith("token_id")]))
    changed = data.draw(st.integers(1, 30) | st.integers(2**10, 2**24))
    if key in ("num_experts_per_tok", "max_position_embeddings"):
        return
    plain = (consistent / "config.json").read_text()
    try:
        (consistent / "config.json").write_text(json.dumps(values | {key: changed}))
        read_or_be_refused(consistent)
    finally:
        (consistent / "config.json").write_text(plain)


@pytest.fixture(scope="module")
def consistent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("consistent") / "x", TINY.replace(num_layers=3))


def test_an_undamaged_folder_is_read(consistent: Path):
    # Or every refusal above would prove nothing.
    assert read_or_be_refused(consistent)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path):
    folder = checkpoint(tmp_path / "x")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        read_decoder(folder)
