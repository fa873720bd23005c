"""Fetch 28,614 headlines with a label, and write them as prompts and completions to learn from.

Half are of The Onion and half of HuffPost; the label says whether a headline is sarcastic. They lie
in the package `evals` (OpenAI evals, MIT); nothing of them is kept in this repository.

    python recipes/headlines.py --out corpus/headlines

writes `train.jsonl` and `validation.jsonl` (one object a line: prompt, completion). One headline in
ten is held out, chosen by a hash of its own text. Needs no third-party module.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from public_domain import SOURCES, fetch, normalise

MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
LABELS = {"0": " no", "1": " yes"}
VALIDATION_SHARE = 10


def prompt_of(headline: str) -> str:
    """Return how a headline is put to a model, as one shot of many or alone."""
    return f"{headline}\nSarcasm:"


def is_held_out(headline: str) -> bool:
    """Say on which side of the split a headline falls, from its text alone."""
    digest = hashlib.sha256(headline.encode()).hexdigest()
    return int(digest, 16) % VALIDATION_SHARE == 0


def read_headlines(package: Path) -> dict[str, str]:
    """Return each different headline with its label, in the order of the package.

    Headlines that stand there with both labels are left out.
    """
    found: dict[str, set[str]] = {}
    with zipfile.ZipFile(package) as archive:
        for line in archive.read(MEMBER).decode("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(normalise(row["input"][1]["content"]), set()).add(row["ideal"])
    return {headline: labels.pop() for headline, labels in found.items() if len(labels) == 1}


def write(path: Path, rows: list[tuple[str, str]]) -> dict[str, object]:
    """Write one example a line, and say what was written."""
    lines = [
        json.dumps({"prompt": prompt_of(text), "completion": LABELS[label]}, ensure_ascii=False)
        for text, label in rows
    ]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(data)
    sarcastic = sum(label == "1" for _, label in rows)
    return {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "headlines": len(rows),
        "sarcastic": sarcastic,
    }


def main() -> None:
    """Fetch, split and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("corpus/headlines"), help="folder to write"
    )
    options = parser.parse_args()
    packages = options.out.resolve() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    (source,) = (one for one in SOURCES if one.package == "evals")
    rows = list(read_headlines(fetch(source, packages)).items())
    manifest = {
        "train": write(options.out / "train.jsonl", [r for r in rows if not is_held_out(r[0])]),
        "validation": write(
            options.out / "validation.jsonl", [r for r in rows if is_held_out(r[0])]
        ),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (options.out / "manifest.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
