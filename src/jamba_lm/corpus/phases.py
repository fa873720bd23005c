"""The phases of a preparation and their tasks: what runs after what, and what is done already.

A task is named by its phase and its number, so that any process on any machine that sees the
folder can carry it out. Knows nothing of who does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jamba_lm.corpus.columns import META, Columns
from jamba_lm.corpus.deduplicate_phase import deduplicate_task
from jamba_lm.corpus.finish_phase import finish_task
from jamba_lm.corpus.pack_phase import SIDES, pack_task
from jamba_lm.corpus.plan import Plan, read_plan
from jamba_lm.corpus.prepared import MANIFEST
from jamba_lm.corpus.read_phase import read_task
from jamba_lm.corpus.tokenize_phase import tokenize_task

WORK = "work"
PHASES = ("read", "deduplicate", "tokenize", "pack", "finish")

Progress = Callable[[int], None]


def num_tasks(plan: Plan, phase: str) -> int:
    """Return how many tasks a phase has."""
    match phase:
        case "read" | "tokenize":
            return len(plan.tasks)
        case "pack":
            return len(plan.recipe.source) * len(SIDES)
        case _:
            return 1


def task_folder(out: Path, phase: str, index: int) -> Path:
    """Return where a task leaves what it has made."""
    return out / WORK / f"{phase}-{index:05d}"


def is_done(out: Path, phase: str, index: int) -> bool:
    """Say whether a task has been carried out."""
    if phase == "finish":
        return (out / MANIFEST).exists()
    return (task_folder(out, phase, index) / META).exists()


def open_tasks(out: Path, plan: Plan, phase: str) -> list[int]:
    """List the tasks of a phase that are still to be done."""
    return [index for index in range(num_tasks(plan, phase)) if not is_done(out, phase, index)]


def run_task(out: Path, phase: str, index: int) -> None:
    """Carry out a task that is known by its name, in a process that knows nothing else.

    Raises:
        JambaError: as in `carry_out`, and when the plan cannot be read.
    """
    if not is_done(out, phase, index):
        carry_out(out, read_plan(out), phase, index, lambda _: None)


def carry_out(out: Path, plan: Plan, phase: str, index: int, progress: Progress) -> None:
    """Carry out a task; the phases before it must be done.

    Args:
        out: folder of the preparation.
        plan: of the preparation.
        phase: one of `PHASES`.
        index: which task of it.
        progress: told of the bytes of text that were worked through.

    Raises:
        JambaError: documents, files or options are unusable, or the system refused to write.
    """

    def parts(of: str) -> list[Columns]:
        return [Columns(task_folder(out, of, one)) for one in range(num_tasks(plan, of))]

    folder = task_folder(out, phase, index)
    match phase:
        case "read":
            read_task(plan, folder, index, progress)
        case "deduplicate":
            deduplicate_task(plan, parts("read"), folder)
        case "tokenize":
            (verdict,) = parts("deduplicate")
            every = parts("read")
            starts = np.cumsum([0, *(len(part["ends"]) for part in every)])
            kept = verdict["kept"][starts[index] : starts[index + 1]]
            tokenize_task(plan, every[index], kept, folder, progress)
        case "pack":
            (verdict,) = parts("deduplicate")
            below = verdict.info["held_out_below"]
            pack_task(plan, parts("tokenize"), below, index, out, folder)
        case _:
            assert phase == "finish"
            finish_task(plan, {one: parts(one) for one in PHASES[:-1]}, out)
            # Only now is there nothing left to go on from.
            shutil.rmtree(out / WORK, ignore_errors=True)
