"""A prompt is text, whatever bytes are given as one."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jamba_lm.cli import prompt
from jamba_lm.cli.prompt import read_prompt
from jamba_lm.errors import InputError


@settings(max_examples=1000)
@example(data=b"\xed\xa0\x80")  # half a surrogate pair, which UTF-8 forbids
@example(data=b"\xc0\x80")  # a zero byte in more bytes than it needs
@given(data=st.binary(max_size=12) | st.text(max_size=6).map(str.encode))
def test_bytes_are_a_prompt_or_refused_in_one_line(tmp_path_factory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "prompt"
    path.write_bytes(data)
    try:
        text = read_prompt(None, path)
    except InputError as error:
        assert "\n" not in str(error)
        with pytest.raises(UnicodeDecodeError):
            data.decode()
    else:
        assert data.decode() in (text, text + "\n", text + "\r\n", text + "\r")


def test_a_prompt_that_no_model_could_read_is_refused_before_it_is_read_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(prompt, "LIMIT_BYTES", 100)
    (tmp_path / "prompt").write_bytes(b"a" * 101)
    with pytest.raises(InputError, match="longer than 100 bytes"):
        read_prompt(None, tmp_path / "prompt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a" * 1000)))
    with pytest.raises(InputError, match="longer than 100 bytes"):
        read_prompt(None, None)


def test_a_folder_is_no_prompt(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        read_prompt(None, tmp_path)
