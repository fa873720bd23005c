"""The same text, cut in every way, against the same text read whole: ours and transformers'.

Both read the same tiny random checkpoint. The yardstick is transformers' own one-shot forward pass;
a difference is the largest one in any logit, as a share of the largest logit.

    python -m benchmarks.any_split [--json | --write docs/any_split.md]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.any_split_cases import CASES, Case
from benchmarks.any_split_models import Bench

# Above float32 rounding through eight layers, far below any difference that a wrong state makes.
WRONG = 1e-4

START, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table; a difference is None where the call was refused."""

    name: str
    peer_call: str
    call: str
    peer_difference: float | None
    peer_refusal: str | None
    our_difference: float

    @property
    def peer_verdict(self) -> str:
        """Say "right", "wrong" or "refused"."""
        if self.peer_difference is None:
            return "refused"
        return "right" if self.peer_difference <= WRONG else "wrong"


def measure() -> list[Row]:
    """Run every case on both sides."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        bench = Bench(Path(folder))
        rows = []
        for case in CASES:
            peer, refusal = attempt(case, bench)
            rows.append(Row(case.name, case.peer_call, case.call, peer, refusal, case.ours(bench)))
        return rows


def attempt(case: Case, bench: Bench) -> tuple[float | None, str | None]:
    """Run the other side of a case; a refusal is its error message."""
    try:
        return case.peer(bench), None
    except ValueError as refusal:
        return None, " ".join(str(refusal).split())[:160]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the notes and progress bars of transformers out of the report, meanwhile."""
    logs: Any = transformers.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| what | in transformers | error | verdict | here | error |",
        "| --- | --- | ---: | --- | --- | ---: |",
    ]
    for row in rows:
        error = "" if row.peer_difference is None else f"{row.peer_difference:.1g}"
        lines.append(
            f"| {row.name} | `{row.peer_call}` | {error} | {row.peer_verdict} "
            f"| `{row.call}` | {row.our_difference:.1g} |"
        )
    refusals = [row for row in rows if row.peer_refusal]
    if refusals:
        lines += ["", "What was refused, and in which words:", ""]
        lines += [f"* {row.name}: `{row.peer_refusal}`" for row in refusals]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it between its marks in a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--write", type=Path, help="replace the table in this document")
    options = parser.parse_args()

    rows = measure()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if options.json:
        listed = [asdict(row) | {"verdict": row.peer_verdict} for row in rows]
        print(json.dumps({"versions": versions, "wrong_above": WRONG, "rows": listed}))
        return
    print(table(rows))
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, rest = text.split(START)
        after = rest.split(END)[1]
        options.write.write_text(
            f"{before}{START}\n{table(rows)}\n{END}{after}", encoding="utf-8", newline="\n"
        )


if __name__ == "__main__":
    main()
