"""What generation_config.json says about sampling is read as it is meant, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.checkpoint.generation_config import FILE, read_sampling_defaults
from jamba_lm.errors import CheckpointError
from tests.tiny_checkpoint import write_json


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {}),
        ({"bos_token_id": 1, "eos_token_id": [2, 518], "max_new_tokens": 9}, {}),
        ({"do_sample": True, "temperature": 0.4}, {"temperature": 0.4}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.4, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"top_k": 50, "min_p": 0.1}, {"top_k": 50, "min_p": 0.1}),
        ({"top_k": 0}, {"top_k": None}),
        ({"top_k": -1, "top_p": None}, {"top_k": None}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
    ids=str,
)
def test_what_is_stated_is_read(tmp_path: Path, stated: dict, expected: dict):
    write_json(tmp_path / FILE, stated)
    assert read_sampling_defaults(tmp_path) == expected


def test_a_folder_without_the_file_states_nothing(tmp_path: Path):
    assert read_sampling_defaults(tmp_path) == {}
    assert read_sampling_defaults(tmp_path / "missing") == {}


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([])
KEYS = ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]


@given(stated=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_a_value_of_another_kind_is_refused_in_one_line(tmp_path_factory, stated: dict):
    folder = tmp_path_factory.mktemp("settings")
    write_json(folder / FILE, stated)
    try:
        found = read_sampling_defaults(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert FILE in str(error)
    else:
        assert all(value is None or isinstance(value, int | float) for value in found.values())
