"""GGUF files: what is written is read, by us and by the gguf package; what is damaged is refused.

A damaged file costs one line, and no memory beyond what the file itself holds.
"""

from __future__ import annotations

import math
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.checkpoint.gguf_reader import GgufWeights
from jamba_lm.conversion import folder_to_gguf
from jamba_lm.errors import CheckpointError, JambaError
from jamba_lm.files import write_atomic
from jamba_lm.gguf_file import BLOCK_TYPES, SCALARS, TYPE_CODES, GgufFile, is_gguf
from jamba_lm.gguf_output import TensorToWrite, Typed, write_gguf
from jamba_lm.text.tokenizer import load_tokenizer
from tests.tiny_checkpoint import write_tiny_checkpoint

RANGES = {"uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64}
SIGNED = {"int8": 8, "int16": 16, "int32": 32, "int64": 64}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def scalars() -> dict[str, st.SearchStrategy[Any]]:
    found: dict[str, st.SearchStrategy[Any]] = {"bool": st.booleans(), "string": TEXT}
    for name, bits in RANGES.items():
        found[name] = st.integers(0, 2**bits - 1)
    for name, bits in SIGNED.items():
        found[name] = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for name, width in (("float32", 32), ("float64", 64)):
        found[name] = st.floats(allow_nan=False, width=width)
    return found


ONE = st.one_of(*(value.map(lambda v, n=name: (n, v)) for name, value in scalars().items()))
LISTS = st.one_of(
    *(
        st.lists(value, max_size=5).map(lambda v, n=name: (f"{n}[]", v))
        for name, value in scalars().items()
    )
)
HEADERS = st.dictionaries(
    TEXT.filter(lambda key: key != "general.alignment"), st.one_of(ONE, LISTS), max_size=8
)


@given(header=HEADERS)
@settings(max_examples=60, deadline=None)
def test_every_kind_of_value_comes_back(tmp_path_factory, header: dict[str, Typed]):
    path = tmp_path_factory.mktemp("values") / "x.gguf"
    write_gguf(path, header, [])
    file = GgufFile(path)
    assert file.keys == tuple(header)
    for key, (kind, value) in header.items():
        assert file.type_of(key) == kind
        assert file.get(key) == value
        assert file.length(key) == (len(value) if kind.endswith("[]") else None)
    assert file.get("no such key") is None


def test_the_gguf_package_reads_the_same_values(tmp_path):
    header: dict[str, Typed] = {
        "a.number": ("int32", -7),
        "a.text": ("string", "naïve 猫"),
        "a.flag": ("bool", True),
        "a.list": ("float32[]", [0.5, -2.0]),
        "a.words": ("string[]", ["x", "", "three words here"]),
        "a.double": ("float64", math.pi),
    }
    data = struct.pack("<6f", *range(6))
    f32 = BLOCK_TYPES[TYPE_CODES["F32"]]
    write_gguf(tmp_path / "x.gguf", header, [TensorToWrite("t", f32, (2, 3), lambda: [data])])
    reader = oracle.GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.fields[key].contents() for key in header} == {
        key: value for key, (_, value) in header.items()
    }
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.data.tolist()) == ("t", [[0, 1, 2], [3, 4, 5]])
    ours = GgufFile(tmp_path / "x.gguf")
    assert bytes(ours.view("t")) == data
    assert ours.tensors["t"].shape == (2, 3)


def test_a_file_of_the_gguf_package_is_read(tmp_path):
    import numpy as np

    writer = oracle.GGUFWriter(tmp_path / "x.gguf", "jamba")
    writer.add_uint32("a.number", 5)
    writer.add_array("a.words", ["x", "yz"])
    writer.add_custom_alignment(128)
    writer.add_tensor("t", np.arange(12, dtype=np.float32).reshape(4, 3))
    writer.add_tensor("u", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert (file.get("a.number"), file.get("a.words")) == (5, ["x", "yz"])
    assert file.tensors["t"].shape == (4, 3)
    assert struct.unpack("<12f", file.view("t")) == tuple(range(12))
    assert file.tensors["u"].kind.name == "F16"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny_checkpoint(folder / "folder")
    folder_to_gguf(folder / "folder", folder / "x.gguf", file_type="f16")
    return (folder / "x.gguf").read_bytes()


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoiled") / "x.gguf"


def use(path: Path) -> None:
    """Read everything that can be read."""
    load_tokenizer(path)
    for value in GgufWeights(GgufFile(path), "fp32").values():
        value.sum()


def must_be_fine_or_refused(path: Path, data: bytes) -> str:
    """Read a file; return the one line that it was refused with, or nothing."""
    write_atomic(path, lambda file: file.write(data))
    try:
        use(path)
    except JambaError as error:
        assert "\n" not in str(error)
        assert 10 < len(str(error)) < 1200
        return str(error)
    return ""


def test_the_unspoiled_file_is_fine(whole, spoiled):
    assert must_be_fine_or_refused(spoiled, whole) == ""


def header_size(data: bytes, path: Path) -> int:
    write_atomic(path, lambda file: file.write(data))
    return min(place.start for place in GgufFile(path).tensors.values())


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_a_file_that_is_cut_short_is_refused(whole, spoiled, data):
    # The padding behind the last tensor may be missing: llama.cpp does not need it either.
    length = data.draw(st.integers(0, len(whole) - 32))
    assert must_be_fine_or_refused(spoiled, whole[:length])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_changed_bytes_are_refused_or_harmless(whole, spoiled, data):
    size = header_size(whole, spoiled)
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, size - 1))
        changed[place] = data.draw(st.integers(0, 255))
    must_be_fine_or_refused(spoiled, bytes(changed))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_changed_numbers_are_refused_or_harmless(whole, spoiled, data):
    """Counts, lengths and offsets are 8 bytes; the worst values they can hold."""
    size = header_size(whole, spoiled)
    place = data.draw(st.integers(0, size - 8))
    number = data.draw(
        st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, len(whole)])
    )
    changed = whole[:place] + struct.pack("<Q", number) + whole[place + 8 :]
    must_be_fine_or_refused(spoiled, changed)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused(spoiled, data):
    for start in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00"):
        assert must_be_fine_or_refused(spoiled, start + data)


def raw(*parts: Any, tensors: int = 0, values: int = 1) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, values)
    return head + b"".join(
        part if isinstance(part, bytes) else struct.pack("<Q", len(part)) + part.encode()
        for part in parts
    )


def tensor(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    text = struct.pack("<Q", len(name)) + name.encode()
    return text + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


MANY = 2**61
DAMAGED: dict[str, tuple[bytes, str]] = {
    "no file at all": (b"", "cannot be mapped"),
    "another format": (b"PK\x03\x04" + bytes(40), "starts with"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "2**61 tensors": (raw(b"", tensors=MANY), "tensors need"),
    "2**61 values": (raw(b"", values=MANY), "need"),
    "a key of 2**61 bytes": (raw(struct.pack("<Q", MANY), bytes(40)), "a key of"),
    "2**61 strings": (raw("k", struct.pack("<IIQ", 9, 8, MANY), bytes(40)), "the strings of 'k'"),
    "2**61 numbers": (raw("k", struct.pack("<IIQ", 9, 4, MANY), bytes(40)), "the values of 'k'"),
    "an array of arrays": (
        raw("k", struct.pack("<IIQ", 9, 9, 1) * 3, bytes(40)),
        "an array of arrays",
    ),
    "an unknown type": (raw("k", struct.pack("<I", 77), bytes(40)), "unknown type 77"),
    "a key twice": (raw(*["k", struct.pack("<IB", 0, 1)] * 2, bytes(40), values=2), "given twice"),
    "a key that is no text": (
        raw(struct.pack("<Q", 1) + b"\xff", struct.pack("<IB", 0, 1), bytes(40)),
        "not UTF-8",
    ),
    "5 axes": (raw(tensor("t", (1,) * 5, 0, 0), bytes(64), tensors=1, values=0), "has 5 axes"),
    "no axes": (raw(tensor("t", (), 0, 0), bytes(64), tensors=1, values=0), "has 0 axes"),
    "no values": (raw(tensor("t", (3, 0), 0, 0), bytes(64), tensors=1, values=0), "has no values"),
    "an unknown tensor type": (
        raw(tensor("t", (4,), 4, 0), bytes(64), tensors=1, values=0),
        "stored as type 4",
    ),
    "half a block": (
        raw(tensor("t", (16,), 8, 0), bytes(64), tensors=1, values=0),
        "its blocks hold 32",
    ),
    "a tensor beyond the end": (
        raw(tensor("t", (2**40, 2**20), 0, 0), bytes(64), tensors=1, values=0),
        "should lie at bytes",
    ),
    "an offset beyond the end": (
        raw(tensor("t", (1,), 0, 2**63), bytes(64), tensors=1, values=0),
        "should lie at bytes",
    ),
    "an odd offset": (
        raw(tensor("t", (1,), 0, 4), bytes(64), tensors=1, values=0),
        "multiple of 32",
    ),
    "a tensor twice": (
        raw(tensor("t", (1,), 0, 0), tensor("t", (1,), 0, 32), bytes(96), tensors=2, values=0),
        "given twice",
    ),
    "two tensors in one place": (
        raw(tensor("t", (9,), 0, 0), tensor("u", (1,), 0, 32), bytes(128), tensors=2, values=0),
        "'u' overlaps 't'",
    ),
    "an alignment of 3": (
        raw("general.alignment", struct.pack("<II", 4, 3), tensor("t", (1,), 0, 0), tensors=1),
        "general.alignment is 3",
    ),
    "an alignment that is a word": (
        raw("general.alignment", struct.pack("<I", 8), "x", tensor("t", (1,), 0, 0), tensors=1),
        "general.alignment is 'x'",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_and_costs_no_memory(tmp_path, name):
    data, words = DAMAGED[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words) as caught:
        GgufFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_where_a_number_should_be_does_not_go_round_in_circles(tmp_path, whole):
    """The number of layers decides how long a list must be, and might itself be a list."""
    old = struct.pack("<Q", 17) + b"jamba.block_count" + struct.pack("<II", 4, 4)
    new = struct.pack("<Q", 17) + b"jamba.block_count" + struct.pack("<IIQI", 9, 4, 1, 4)
    assert whole.count(old) == 1
    assert "expected a whole number" in must_be_fine_or_refused(
        tmp_path / "x.gguf", whole.replace(old, new)
    )


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.gguf"):
        GgufFile(tmp_path / "nowhere.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match="expected a GGUF file"):
        GgufFile(tmp_path / "folder.gguf")
    assert not is_gguf(tmp_path / "folder.gguf")
    assert is_gguf(tmp_path / "x.GGUF")


def test_a_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    f32 = BLOCK_TYPES[TYPE_CODES["F32"]]

    def fail() -> Any:
        raise CheckpointError("no more")

    with pytest.raises(CheckpointError, match="no more"):
        write_gguf(path, {}, [TensorToWrite("t", f32, (4,), fail)])
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["x.gguf"]


def test_every_scalar_has_a_layout():
    assert {code.name.lower() for code in oracle.GGUFValueType} == {
        *(name for name, _ in SCALARS.values()),
        "string",
        "array",
    }


def test_tensors_outlive_the_file(tmp_path, whole):
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    view = GgufFile(path).view("output_norm.weight")
    shutil.rmtree(tmp_path)
    assert len(bytes(view)) == len(view) > 0
