"""The commands in README and docs: found, run in a sandbox, and compared with what the text shows.

A fenced block says by its first word what it is:

    console          `$ command` lines and their exact output; a line `...` stands for any lines
    console varies   the same, but only that it works is checked: timings, generated text
    python           runs after the python blocks before it in the same document
    sh               set-up on the reader's machine: checked to name things that exist

`python -m tests.documents README.md` writes the output of today into the `console` blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)

# A user's commands, from the source tree, whether or not the package is installed.
JAMBA = """\
#!{python}
import sys
sys.path.insert(0, {source!r})
from jamba_lm.cli.main import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    kind: str
    varies: bool
    body: str
    start: int

    def commands(self) -> Iterator[tuple[str, str]]:
        """Yield each `$ command` with the output that the document shows for it."""
        for part in re.split(r"^\$ ", self.body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = f"{command[:-1]}{more.strip()}"
            yield command, output


def blocks(document: Path) -> list[Block]:
    """List the fenced blocks of `document`."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(match[1] or "", match[2].strip() == "varies", match[3], match.start(3))
        for match in FENCE.finditer(text)
    ]


class Sandbox:
    """An empty folder with the files that documents refer to, and `jamba` on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".programs"
        programs.mkdir(parents=True)
        command = programs / "jamba"
        command.write_text(JAMBA.format(python=sys.executable, source=str(ROOT / "src")))
        command.chmod(0o755)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        (folder / "README.md").symlink_to(ROOT / "README.md")
        self.environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "HOME": str(folder / "home"),
            "COLUMNS": "100",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command as a reader would, and return what a terminal would show."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    def run_python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run a script."""
        script = self.folder / "example.py"
        script.write_text(code, encoding="utf-8")
        return self.run("python example.py")


def matches(shown: str, printed: str) -> bool:
    """Say whether `printed` is what the document shows, where `...` lines stand for anything."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"[ \t]*\n"
        for line in shown.rstrip("\n").split("\n")
    )
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None


def refresh(document: Path, sandbox: Sandbox) -> None:
    """Write what the commands of `document` print today into it; `...` blocks stay as they are."""
    text = document.read_text(encoding="utf-8")
    shift = 0
    for block in blocks(document):
        if block.kind != "console":
            continue
        body = ""
        for command, shown in block.commands():
            printed = sandbox.run(command).stdout
            keep = "..." in shown.split("\n") or not shown.strip()
            body += f"$ {command}\n{shown if keep else printed.rstrip() + chr(10)}"
        first, end = block.start + shift, block.start + shift + len(block.body)
        text = text[:first] + body + text[end:]
        shift += len(body) - len(block.body)
    document.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Refresh the documents named on the command line."""
    import tempfile

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            refresh(Path(name).resolve(), Sandbox(Path(folder) / "sandbox"))


if __name__ == "__main__":
    main()
