"""What a command prints, and where: results on stdout, everything else on stderr.

Under `--json`, stdout carries one JSON object and nothing more. Does not know what is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

# How often a progress line is written: on a terminal it is rewritten in place, in a log it is one
# more line.
TERMINAL_INTERVAL_SECONDS = 0.1
LOG_INTERVAL_SECONDS = 10.0


class Output:
    """The two streams of one command.

    Attributes:
        json_wanted: whether the command was asked for one JSON object.
    """

    def __init__(self, json_wanted: bool = False) -> None:
        self.json_wanted = json_wanted
        self._at_line_start = True

    @property
    def _text_stream(self) -> TextIO:
        return sys.stderr if self.json_wanted else sys.stdout

    def write(self, text: str) -> None:
        """Print a piece of the result at once, without a line break."""
        if not text:
            return
        self._text_stream.write(text)
        self._text_stream.flush()
        self._at_line_start = text.endswith("\n")

    def line(self, text: str = "") -> None:
        """Print a line of the result: on stdout, or on stderr when stdout is for JSON."""
        self.write(text + "\n")

    def end_line(self) -> None:
        """Break the line, unless the last thing written did."""
        if not self._at_line_start:
            self.write("\n")

    def note(self, text: str) -> None:
        """Print a line beside the result, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the one JSON object, if it was asked for."""
        if not self.json_wanted:
            return
        plain = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        text = json.dumps(value, indent=2, ensure_ascii=not plain, allow_nan=False)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def progress(self, label: str, total: int, unit: str) -> Progress:
        """Return a progress line on stderr, to be used in a `with` statement."""
        return Progress(label, total, unit)


class Progress:
    """One line on stderr that says how far a long piece of work has come."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._on_terminal = sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the line off the terminal again."""
        if self._on_terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0

    def update(self, done: int, more: str = "", *, total: int | None = None) -> None:
        """Say that `done` of the total is done; `more` is put behind it.

        Args:
            done: how much is done.
            more: put behind it.
            total: a new total, for work whose size shows only when it begins.
        """
        self._total = self._total if total is None else total
        if done >= self._total:
            self.clear()
            return
        now = time.monotonic()
        interval = TERMINAL_INTERVAL_SECONDS if self._on_terminal else LOG_INTERVAL_SECONDS
        if now - self._last < interval:
            return
        self._last = now
        rate = done / max(now - self._started, 1e-9)
        share = 100 * done / self._total if self._total else 100.0
        text = (
            f"{self._label}: {done:,} of {self._total:,} {self._unit} ({share:.0f} %), "
            f"{rate:,.0f} {self._unit}/s{', ' + more if more else ''}"
        )
        if self._on_terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = max(self._width, len(text))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
