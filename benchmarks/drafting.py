"""Tokens a second with drafts and without, on text that repeats some and on text that does not.

    python -m benchmarks.drafting [--model FOLDER] [--dtype bf16] [--out FILE]

What a model writes is its own affair: a small one may not quote though it is asked to. So there are
several texts of each kind, beside each speed stands the share of drafts that were accepted, and the
two speeds are of the same text, unless the last column says otherwise. The time is that of writing,
from the first token to the last; the prompt is read before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import jamba_lm
from benchmarks.quiet import Verdict
from benchmarks.ratios import paired
from benchmarks.record import ROOT, hardware, require_green, write_json
from benchmarks.timing import Patience, Stopwatch
from jamba_lm.drafting.lookup import DraftCounts
from jamba_lm.generation import generate
from jamba_lm.language_model import LanguageModel
from jamba_lm.sampling import Sampling
from jamba_lm.text.documents import read_documents
from jamba_lm.text.tokenizer import Tokenizer

SAMPLE = ROOT / "tests" / "data" / "held_out.jsonl"
SOURCE = ROOT / "src" / "jamba_lm"
# Files of which a piece is written again, and what is renamed in it.
EDITS = {
    "model/mamba.py": ("channels", "width"),
    "model/attention.py": ("d_head", "head_size"),
    "model/moe.py": ("experts", "parts"),
    "text/tokenizer.py": ("tokenizer", "words"),
}
PASSAGES, FREE_TEXTS = 8, 4
PASSAGE_CHARACTERS, BEGINNING_CHARACTERS = 1200, 60
PATIENCE = Patience(wanted=5, most=40, seconds=120.0)
GREEDY, FREE = Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=1)


@dataclass(frozen=True, slots=True)
class Task:
    """Something to write.

    Attributes:
        kind: what it is, for the table.
        number: which of its kind, from 1.
        prompt: what comes before.
        sampling: how the tokens are picked.
    """

    kind: str
    number: int
    prompt: str
    sampling: Sampling

    @property
    def name(self) -> str:
        """What a line of the table is called."""
        return f"{self.kind} {self.number}"


def tasks() -> list[Task]:
    """List what is written: passages quoted, code with one name changed, and text of its own."""
    texts = [text for text in read_documents(SAMPLE) if len(text) > PASSAGE_CHARACTERS]
    chosen = texts[:: len(texts) // (PASSAGES + FREE_TEXTS)]
    found = []
    for number, text in enumerate(chosen[:PASSAGES], start=1):
        passage = text[:PASSAGE_CHARACTERS]
        found.append(Task("passage quoted", number, again(passage, passage), GREEDY))
    for number, (name, (before, after)) in enumerate(EDITS.items(), start=1):
        code = (SOURCE / name).read_text(encoding="utf-8").split("\nclass ")[1]
        code = code[:PASSAGE_CHARACTERS]
        assert before in code, f"{name} begins without {before!r}: there is nothing to rename"
        edited = code.replace(before, after)
        found.append(Task("code, one name changed", number, again(code, edited), GREEDY))
    for number, text in enumerate(chosen[PASSAGES:][:FREE_TEXTS], start=1):
        found.append(Task("free text", number, text[:BEGINNING_CHARACTERS], FREE))
    return found


def again(text: str, beginning: str) -> str:
    """Return a prompt after which `text` should be written again."""
    return f"{text}\n\n{text}\n\n{beginning[:BEGINNING_CHARACTERS]}"


class Writer:
    """One task, written with drafts or without, over and over."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, task: Task, count: int, draft: str | None
    ) -> None:
        self.ids: list[int] = []
        self.drafting: DraftCounts | None = None
        self._model = model
        self._prompt = tokenizer.encode(task.prompt)
        self._sampling = task.sampling
        self._count = count
        self._draft = draft

    def __call__(self) -> float:
        """Write, and return the seconds from the first token to the last."""
        tokens = generate(
            self._model,
            self._prompt,
            max_new_tokens=self._count,
            sampling=self._sampling,
            draft=self._draft,
        )
        written = [next(tokens)]
        started = time.perf_counter()
        written.extend(tokens)
        seconds = time.perf_counter() - started
        self.ids = [token.id for token in written]
        self.drafting = written[-1].drafting
        return seconds


def measure(
    model: LanguageModel, tokenizer: Tokenizer, count: int, threads: int, patience: Patience
) -> dict[str, Any]:
    """Write every task both ways, side by side."""
    watch = Stopwatch(threads)
    rows = []
    for task in tasks():
        plain, drafted = (
            Writer(model, tokenizer, task, count, draft) for draft in (None, "lookup")
        )
        actions: dict[str, Callable[[], float]] = {
            f"{task.name}, plain": plain,
            f"{task.name}, drafted": drafted,
        }
        verdicts = list(watch.alternate(actions, patience).values())
        rows.append(row(task, plain, drafted, *verdicts))
    return {"hardware": hardware(), "dtype": str(model.dtype), "new_tokens": count, "tasks": rows}


def row(
    task: Task, plain: Writer, drafted: Writer, without: Verdict, with_drafts: Verdict
) -> dict[str, Any]:
    """Put together what became of one task."""
    assert drafted.drafting is not None
    ratio = paired(without, with_drafts)
    return {
        "task": task.name,
        "kind": task.kind,
        "plain_tokens_per_second": (len(plain.ids) - 1) / without.seconds,
        "drafted_tokens_per_second": (len(drafted.ids) - 1) / with_drafts.seconds,
        "ratio": ratio.median,
        "ratio_interval": ratio.interval,
        "drafting": drafted.drafting._asdict(),
        "same_text": plain.ids == drafted.ids,
        "problems": [ratio.problem] if ratio.problem else [],
        "samples": [asdict(one) for one in (without, with_drafts)],
    }


def table(result: dict[str, Any]) -> str:
    """Lay the result out as a Markdown table."""
    lines = [
        "| task | plain, tokens/s | drafted | ratio | accepted | tokens a call | same text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in result["tasks"]:
        counts = one["drafting"]
        cells = [
            one["task"],
            f"{one['plain_tokens_per_second']:,.1f}",
            f"{one['drafted_tokens_per_second']:,.1f}",
            f"{one['ratio']:.2f}",
            f"{counts['accepted']:,} of {counts['proposed']:,}",
            f"{result['new_tokens'] / counts['calls']:.2f}",
            "yes" if one["same_text"] else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """Say of each kind of text what the median of its ratios is, and how they are spread."""
    kinds: dict[str, list[float]] = {}
    for one in result["tasks"]:
        kinds.setdefault(one["kind"], []).append(one["ratio"])
    return [
        f"{kind}: {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f} "
        f"in {len(ratios)} texts"
        for kind, ratios in kinds.items()
    ]


def main() -> None:
    """Print a table and, with --out, write the JSON record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded one by default")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=PATIENCE.wanted, help="quiet ones wanted")
    parser.add_argument("--seconds", type=float, default=PATIENCE.seconds, help="for each task")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    require_green("tests/test_drafted_generation.py", "tests/drafting")
    torch.set_num_threads(options.threads)
    folder = options.model or jamba_lm.embedded_model_path()
    model = jamba_lm.load(folder, dtype=options.dtype)
    tokenizer = jamba_lm.load_tokenizer(folder)
    patience = Patience(options.samples, PATIENCE.most, options.seconds)
    result = measure(model, tokenizer, options.new_tokens, options.threads, patience)
    print(table(result))
    print("", *summary(result), sep="\n")
    print(f"\n{result['dtype']}, {result['hardware']}")
    for one in result["tasks"]:
        for problem in one["problems"]:
            print(f"CONTAMINATED, do not quote: {one['task']}: {problem}")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
