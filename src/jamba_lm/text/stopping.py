"""Text that arrives token by token, and ends before the first stop string.

Does not know where the tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jamba_lm.errors import InputError

if TYPE_CHECKING:
    from jamba_lm.text.decoding import TextStream


class StoppingText:
    """Text that arrives token by token, and ends before the first stop string.

    Nothing that may turn out to be the beginning of a stop string is let out before it is certain.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, stream: TextStream, stop_strings: Sequence[str]) -> None:
        """Wrap a tokenizer's stream.

        Raises:
            InputError: a stop string is empty or not a string.
        """
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop string {stop!r}: expected a string, and not an empty one")
        self.stopped = False
        self._stream = stream
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def push(self, token: int) -> str:
        """Take one more token, and return the text that is now certain."""
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """Return what was held back: no more tokens will come."""
        text = self._release(self._stream.flush())
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _release(self, more: str) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` with which `text` ends.

    >>> overlap("the en", "end")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
