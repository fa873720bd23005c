"""The benchmark of data preparation measures what it says, on text that can be checked by hand."""

from __future__ import annotations

import random

import pytest

from benchmarks.data_preparation import dropped, edited, lost, passes, replaced, table, write_jsonl
from jamba_lm.corpus.code_filter import CodeStage
from jamba_lm.corpus.pii import PiiStage
from jamba_lm.corpus.recipe import CodeSection
from tests.corpus.corpora import sentence_text


def test_that_share_of_the_words_is_replaced():
    text = " ".join(f"word{number}" for number in range(100))
    changed = edited(text, 0.1, random.Random(0)).split(" ")
    differing = sum(one != other for one, other in zip(text.split(" "), changed, strict=True))
    assert 8 <= differing <= 10
    assert edited(text, 0.0, random.Random(0)) == text


def test_a_chain_passes_what_every_stage_passes():
    stages = [PiiStage(["email"]), CodeStage(CodeSection(maximum_line_characters=20))]
    assert passes(stages, "short: " + "a" * 30 + "@mail.org")
    assert not passes(stages, "x" * 21)


def test_losses_are_read_from_a_real_preparation(tmp_path):
    texts = [sentence_text(number) for number in range(5)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", texts[:2])
    sources = [{"name": name, "files": [f"{name}.jsonl"]} for name in "ab"]
    report = dropped(tmp_path, "out", source=sources)
    assert lost(report, "a", "exact duplicates") == 0
    assert lost(report, "b", "exact duplicates") == 2
    with pytest.raises(AssertionError):
        lost(report, "b", "no such stage")


def test_a_table_goes_between_its_marks_and_nowhere_else():
    document = "a\n<!-- table: x begin -->\nold\n<!-- table: x end -->\nb\n"
    body = table(["n", "m"], [[1, "two"]])
    assert replaced(document, "x", body) == (
        "a\n<!-- table: x begin -->\n| n | m |\n| --- | --- |\n| 1 | two |\n"
        "<!-- table: x end -->\nb\n"
    )
    with pytest.raises(AssertionError):
        replaced(document, "y", body)
