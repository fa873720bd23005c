"""Text is read piece by piece, and nothing of it is lost or made up."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st

from jamba_lm.text import corpus
from jamba_lm.text.corpus import read_pieces
from tests.text.folders import TEXTS, written


@hypothesis.given(text=TEXTS, size=st.integers(1, 9), line=st.integers(4, 30))
@hypothesis.settings(
    max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_pieces_of_a_text_file_put_together_are_the_file(tmp_path, monkeypatch, text, size, line):
    hypothesis.assume(text and "\0" not in text)
    monkeypatch.setattr(corpus, "PIECE_BYTES", size)
    monkeypatch.setattr(corpus, "TEXT_LINE_BYTES", line)
    path = written(tmp_path, "a.txt", text)
    pieces = list(read_pieces(path))
    assert "".join(piece for piece, _ in pieces) == text
    assert pieces[-1][1] == len(text.encode())


def test_a_file_is_never_read_as_a_whole(tmp_path):
    path = written(tmp_path, "a.txt", b"word " * 1_000_000 + b"\n" + b"line\n" * 500_000)
    longest = max(len(piece) for piece, _ in read_pieces(path))
    assert longest <= corpus.TEXT_LINE_BYTES + corpus.PIECE_BYTES
