"""The records of fine-tuning files: conversations, prompts with their completions, plain texts.

Knows files and JSON, and nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.config_json import shown
from jamba_lm.errors import DataError
from jamba_lm.text.documents import MAXIMUM_LINE_BYTES

EXPECTED = 'expected an object with "messages", with "prompt" and "completion", or with "text"'
KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}


class BadRecord(DataError):
    """A record that cannot be used.

    Attributes:
        kind: one word or two for the count.
        reason: what is wrong with it, without where it stands.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in its file.

    Attributes:
        where: for messages: "line 3 of 'train.jsonl'".
        data: its bytes.
        is_text: it is a whole plain file, and no JSON.
    """

    where: str
    data: bytes
    is_text: bool

    def value(self) -> Mapping[str, Any]:
        """Return what the record says: an object of one of the three kinds.

        Raises:
            BadRecord: it is not one.
        """
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise BadRecord("not UTF-8", f"not UTF-8 at byte {cause.start:,}") from cause
        if self.is_text:
            return {"text": _some_text(text, "the file")}
        try:
            value = json.loads(text)
        except (RecursionError, ValueError) as cause:
            raise BadRecord("not JSON", f"not JSON: {EXPECTED}") from cause
        return _understood(value)


def _understood(value: Any) -> Mapping[str, Any]:
    kinds = [kind for kind in KEYS if isinstance(value, dict) and kind in value]
    if len(kinds) != 1:
        what = f"has both {' and '.join(kinds)}" if kinds else f"is {shown(value)}"
        raise BadRecord("malformed", f"{what}: {EXPECTED}")
    (kind,) = kinds
    if kind == "messages":
        if not isinstance(value["messages"], list) or not value["messages"]:
            raise BadRecord("empty", "has no messages: a conversation has two or more")
        tools = value.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise BadRecord("malformed", f"has tools {shown(tools)}: expected a list of schemas")
        return {"messages": value["messages"], "tools": tools or None}
    texts = {}
    for key in KEYS[kind]:
        given = value.get(key)
        # A prompt may be empty: then the completion is learned from nothing.
        texts[key] = _text(given, key) if key == "prompt" else _some_text(given, key)
    return texts


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord("malformed", f"{what} is {shown(value)}: expected a text")
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise BadRecord(
            "malformed", f"{what} holds half a surrogate pair at character {cause.start:,}"
        ) from cause
    if "\0" in value:
        raise BadRecord("binary", f"{what} holds a null character: is it binary?")
    return value


def _some_text(value: Any, what: str) -> str:
    text = _text(value, what)
    if not text.strip():
        raise BadRecord("empty", f"{what} is empty")
    return text


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file: one a line of a .jsonl file, or the whole of any other.

    Empty lines are skipped.

    Raises:
        DataError: the file is missing or cannot be read, or a line of it is longer than any record.
    """
    if not path.is_file():
        raise DataError(f"no data at {str(path)!r}: expected a .jsonl or a plain text file")
    try:
        with path.open("rb") as file:
            if path.suffix != ".jsonl":
                yield Record(f"{str(path)!r}", file.read(), is_text=True)
                return
            number = 0
            while line := file.readline(MAXIMUM_LINE_BYTES):
                number += 1
                if len(line) == MAXIMUM_LINE_BYTES:
                    raise DataError(
                        f"line {number:,} of {str(path)!r} is longer than "
                        f"{MAXIMUM_LINE_BYTES:,} bytes: expected one JSON object a line"
                    )
                if line.strip():
                    yield Record(f"line {number:,} of {str(path)!r}", line, is_text=False)
    except OSError as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause
