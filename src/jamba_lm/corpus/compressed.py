"""Files that may be compressed, opened for reading by the end of their name.

Knows gzip and zstd, and nothing of what the bytes mean.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from jamba_lm.errors import BackendUnavailable

SUFFIXES = (".gz", ".zst")
# A block of four bytes may stand for 128 KiB of one letter, so this many for 32 MiB.
_ZSTD_BLOCK_BYTES = 1024


class BrokenFile(Exception):
    """What follows in a compressed file cannot be read; what came before was whole."""


def plain_name(path: Path) -> str:
    """Return the name without the end that says how it is compressed.

    >>> plain_name(Path("a/Web.jsonl.gz"))
    'web.jsonl'
    """
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


class _ZstdReader:
    """Reads frames one after the other, and notices an end in the middle of one.

    The library's own stream reader takes a file that was cut off for one that has ended.
    """

    def __init__(self, packed: BinaryIO, library: Any) -> None:
        self._packed = packed
        self._library = library
        self._frame: Any = None
        self._rest = b""
        self._plain = bytearray()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the end.

        Raises:
            BrokenFile: the data is damaged or ends early.
        """
        while not self._plain:
            block, self._rest = self._rest or self._packed.read(_ZSTD_BLOCK_BYTES), b""
            if not block:
                if self._frame is not None:
                    raise BrokenFile("zstd: the file ends in the middle of a frame")
                return b""
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._plain += self._frame.decompress(block)
            except self._library.ZstdError as cause:
                raise BrokenFile(f"zstd: {cause}") from cause
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        taken = bytes(self._plain[:size])
        del self._plain[:size]
        return taken


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked.

    Raises:
        BrokenFile: the compressed data ends early or is damaged.
        BackendUnavailable: the file is zstd and the package for it is missing.
        OSError: the system refused.
    """
    kind = path.suffix.lower()
    if kind == ".gz":
        try:
            with gzip.open(path) as file:
                yield cast(BinaryIO, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
            raise BrokenFile(f"gzip: {cause}") from cause
    elif kind == ".zst":
        try:
            import zstandard
        except ImportError as cause:
            raise BackendUnavailable(
                f"{str(path)!r} is zstd: install the package for it with "
                "`pip install 'jamba-lm[data]'`"
            ) from cause
        with path.open("rb") as packed:
            yield cast(BinaryIO, _ZstdReader(packed, zstandard))
    else:
        with path.open("rb") as file:
            yield file


def lines(file: BinaryIO, maximum_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file, each with its length; a longer one is cut, not held in memory.

    Args:
        file: anything with `read`.
        maximum_bytes: of a line; of a longer one only that much is returned.
    """
    kept: list[bytes] = []
    kept_bytes = num_bytes = 0
    while block := file.read(2**16):
        start = 0
        while start < len(block):
            end = block.find(b"\n", start)
            stop = len(block) if end < 0 else end
            room = maximum_bytes - kept_bytes
            if room > 0:
                piece = block[start : min(stop, start + room)]
                kept.append(piece)
                kept_bytes += len(piece)
            num_bytes += stop - start
            start = stop + 1
            if end >= 0:
                yield b"".join(kept), num_bytes
                kept, kept_bytes, num_bytes = [], 0, 0
    if num_bytes:
        yield b"".join(kept), num_bytes
