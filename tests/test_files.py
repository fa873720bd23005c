"""Files are written whole or not at all, and JSON that could mislead is refused."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.errors import ConfigError, InputError
from jamba_lm.files import (
    make_folder,
    parse_json,
    path_kind,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
)
from tests.config_strategies import json_values

SOURCE = Path(__file__).resolve().parent.parent / "src"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second, longer"):
        write_atomic(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names_in(tmp_path) == ["a.bin"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.bin"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys\n"
        "from jamba_lm.files import write_atomic\n"
        "def write(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(sys.argv[1], write)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert path.read_bytes() == b"old"
    # What it left is known by its name; a file of somebody else is not touched.
    (tmp_path / ".a.bin.mine.tmp").write_bytes(b"mine")
    assert len(names_in(tmp_path)) == 3
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == [".a.bin.mine.tmp", "a.bin"]


def test_a_new_file_has_ordinary_permissions(tmp_path):
    ordinary, atomic = tmp_path / "ordinary", tmp_path / "atomic"
    ordinary.write_bytes(b"")
    write_atomic(atomic, lambda file: file.write(b"x"))
    assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_link_keeps_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomic(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("place", ["missing/a.bin", "file/a.bin", "folder"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"^cannot write .*; check the folder[^\n]*$"):
        write_atomic(tmp_path / place, lambda file: file.write(b"x"))
    assert names_in(tmp_path) == ["file", "folder"]


def test_a_folder_is_made_with_its_parents_and_not_over_a_file(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot make the folder"):
        make_folder(tmp_path / "file")


def test_path_kinds_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    found = [path_kind(path) for path in (tmp_path, tmp_path / "file", tmp_path / "pipe")]
    assert found == ["folder", "file", "other"]
    assert [path_kind(p) for p in (tmp_path / "no", "x" * 5000, "nul\0")] == ["missing"] * 3


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "inf" not in repr(value))


@given(st.dictionaries(st.text(), plain_values, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    if any(0xD800 <= ord(c) < 0xE000 for c in repr(value)):
        return
    write_json(path, value)
    assert read_json(path, "test file", ConfigError) == value
    assert path.read_bytes().endswith(b"\n")


BAD_JSON = {
    "nothing at all": (b"", "line 1, column 1"),
    "not an object": (b"[1, 2]", "expected an object, found list"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "a float too large": (b'{"a": 1e999}', "1e999 does not fit a float"),
    "a key given twice": (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice"),
    "a nesting bomb": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "an object bomb": (b'{"a": ' * 100_000, "nested too deeply"),
    "an integer of ten thousand digits": (b'{"a": ' + b"9" * 10_000 + b"}", "thousands of digits"),
    "latin-1": (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "two objects": (b"{} {}", "Extra data"),
    "a control character": (b'{"a": "\n"}', "Invalid control character"),
    "a comment": (b'{"a": 1} // why', "Extra data"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_could_mislead_is_refused(case):
    data, reason = BAD_JSON[case]
    with pytest.raises(ConfigError) as refused:
        parse_json(data, "test file", ConfigError)
    assert str(refused.value).startswith("test file is not usable JSON: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_an_object_or_one_line(data):
    try:
        assert isinstance(parse_json(data, "test file", ConfigError), dict)
    except ConfigError as refused:
        assert len(str(refused).splitlines()) == 1
        assert len(str(refused)) < 300


def test_a_file_over_the_limit_is_not_read_into_memory(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="longer than 1,000 bytes"):
        read_json(path, "test file", ConfigError, limit_bytes=1000)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", "/dev/zero"):
        with pytest.raises(ConfigError, match="expected a regular file"):
            read_json(path, "test file", ConfigError)
