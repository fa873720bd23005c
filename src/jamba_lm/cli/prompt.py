"""Where a prompt comes from: an option, a file, or what is piped in; always checked to be text.

Knows nothing about tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jamba_lm.errors import InputError
from jamba_lm.files import MIB

# Ten times the longest context of any published model.
LIMIT_BYTES = 64 * MIB


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt: that of `--prompt`, of `--prompt-file`, or of standard input.

    One line break at the end of a file or of standard input is taken off: editors and `echo` put it
    there, and a model would take it for the end of a paragraph.

    Raises:
        InputError: both or neither were given, the file cannot be read, or it is not UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file are both given: choose one")
    if prompt is not None:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        return _decode(prompt.encode("utf-8", "surrogateescape"), "--prompt")
    if prompt_file is not None:
        return _without_last_break(_decode(_read_file(prompt_file), f"{str(prompt_file)!r}"))
    if sys.stdin.isatty():
        raise InputError("no prompt: give --prompt TEXT, --prompt-file PATH, or pipe a text in")
    data = sys.stdin.buffer.read(LIMIT_BYTES + 1)
    return _without_last_break(_decode(data, "standard input"))


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot read the prompt file {str(path)!r}: {error.strerror or error}"
        ) from error


def _decode(data: bytes, source: str) -> str:
    if len(data) > LIMIT_BYTES:
        raise InputError(f"the prompt from {source} is longer than {LIMIT_BYTES:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt from {source} is not UTF-8: byte {error.start:,} is "
            f"0x{data[error.start]:02x} ({error.reason})"
        ) from error


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
