"""The table in docs/any_split.md, run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import any_split
from tests.tolerances import ANY_SPLIT

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "any_split.md"


@pytest.fixture(scope="module")
def rows() -> list[any_split.Row]:
    return any_split.measure()


def documented_verdicts() -> dict[str, str]:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return {name: verdict for name, _, _, verdict, _, _ in cells if name not in {"what", "---"}}


def test_every_split_gives_the_same_answer_here(rows):
    wrong = {row.name: row.our_difference for row in rows if row.our_difference > ANY_SPLIT["fp32"]}
    assert not wrong


def test_the_documented_verdicts_on_transformers_still_hold(rows):
    assert {row.name: row.peer_verdict for row in rows} == documented_verdicts()
