"""A document on its way through a preparation, and what may become of it.

Knows neither files nor stages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from.

    Attributes:
        text: never empty, without null characters and lone surrogates.
        position: number of the record in its file, from 0.
        place: the same for a person: "file.jsonl:17".
    """

    text: str
    position: int
    place: str


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something that should have been a document.

    Attributes:
        reason: a word for the table of the report.
        place: where it is.
        detail: what is wrong, for the report and for the error.
        num_bytes: how long it is, as far as it was read.
    """

    reason: str
    place: str
    detail: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The verdict of a stage that wants no more of a document."""

    reason: str


def excerpt(text: str, characters: int) -> str:
    r"""Return the beginning of `text` for a report, with unprintable characters escaped.

    >>> excerpt("a\x00b" + "c" * 20, 8)
    'a\\x00bccc...'
    """
    cut = text[:characters]
    shown = "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode("ascii")
        for one in cut
    )
    return shown + ("..." if len(text) > characters else "")
