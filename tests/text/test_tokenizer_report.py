"""What is measured of a tokenizer is what was counted by hand."""

from __future__ import annotations

import json

import pytest

from jamba_lm.errors import DataError
from jamba_lm.text.tokenizer import load_tokenizer
from jamba_lm.text.tokenizer_report import measure_text
from tests.text.folders import loaded, read, trained_folder


def test_a_measure_counts_bytes_tokens_and_digits():
    measure = measure_text(loaded("trained byte-level"), ["x = 12, é\n", "3"])
    assert (measure.num_bytes, measure.num_digits, measure.num_pieces) == (12, 3, 2)
    assert measure.digits_split == 1.0
    assert measure.num_changed == 0
    assert measure.bytes_per_token == 12 / measure.num_tokens


def test_a_measure_sees_digits_that_stick_together(tmp_path):
    document = read(trained_folder("byte-level") / "tokenizer.json")
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]
    document["model"]["vocab"]["12"] = 700
    document["model"]["merges"].insert(0, ["1", "2"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    measure = measure_text(load_tokenizer(tmp_path), ["12 3"])
    assert (measure.num_digits, measure.num_lone_digits) == (3, 1)


def test_nothing_cannot_be_measured():
    with pytest.raises(DataError, match="no text to measure"):
        measure_text(loaded("trained byte-level"), [""])
