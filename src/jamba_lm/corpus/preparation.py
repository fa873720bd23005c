"""From a recipe to a prepared folder, gone on with when it was stopped.

Knows who does the work on this machine; what the work is, is in the phases.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jamba_lm.corpus.columns import refused_as_input_error
from jamba_lm.corpus.phases import PHASES, WORK, carry_out, open_tasks, run_task
from jamba_lm.corpus.plan import PLAN, Plan, check_same, make_plan, read_plan, write_plan
from jamba_lm.corpus.prepared import MANIFEST, PreparedCorpus
from jamba_lm.corpus.recipe import CorpusRecipe
from jamba_lm.corpus.stages import make_stages
from jamba_lm.corpus.tokenize_phase import open_tokenizer, tokenizer_folder
from jamba_lm.errors import CapacityError, DataError, InputError
from jamba_lm.files import make_folder, path_kind, remove_leftovers

# Phase, how much of it is done, of how much, and in what.
Watch = Callable[[str, int, int, str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `prepare` ended.

    Attributes:
        corpus: what there is; None when the work was handed over to a cluster.
        already_done: whether there was nothing left to do.
    """

    corpus: PreparedCorpus | None
    already_done: bool


def prepare(recipe: CorpusRecipe, out: Path, watch: Watch = lambda *_: None) -> Outcome:
    """Carry out `recipe` in `out`, going on with what was done there before.

    The folder gets `corpus.json` (the manifest), `shards/`, `tokenizer/`, `report.json`,
    `report.html` and `plan.json`. The same recipe and files give the same bytes of all but the
    report's seconds, whoever does the work and however often it was stopped.

    Args:
        recipe: what to do.
        out: made when missing.
        watch: told how far it is.

    Raises:
        InputError: the folder is in use, holds something else, or cannot be written to; what was
            finished is kept.
        DataError: files are missing, unusable, or have changed since the work began.
        RecipeError: an option is not one of its stage's or executor's.
        BackendUnavailable: a package that the recipe needs is missing.
        TokenizerError: the tokenizer is unusable.
    """
    with _only_one(out):
        plan = make_plan(recipe)
        if path_kind(out / PLAN) == "file":
            old = read_plan(out)
            check_same(old, plan, out)
            # The work stays cut as it was; who does it may change.
            plan = Plan(recipe, old.units, old.tasks, old.protected)
        else:
            _check_empty(out)
        if path_kind(out / MANIFEST) == "file":
            shutil.rmtree(out / WORK, ignore_errors=True)
            return Outcome(PreparedCorpus(out), already_done=True)
        _check_ready(recipe)
        write_plan(out, plan)
        make_folder(out / WORK)
        if recipe.execution.executor == "local":
            _run_here(out, plan, watch)
        else:
            from jamba_lm.corpus.datatrove_execution import run_with_datatrove

            if not run_with_datatrove(out, plan):
                return Outcome(None, already_done=False)
        return Outcome(PreparedCorpus(out), already_done=False)


def _check_ready(recipe: CorpusRecipe) -> None:
    """Find out now what would stop the work in an hour."""
    folder = tokenizer_folder(recipe.tokens.tokenizer)
    if path_kind(folder) != "folder":
        raise DataError(
            f"tokens.tokenizer is {str(folder)!r}: expected a folder with tokenizer.json, which is "
            "copied beside the tokens"
        )
    open_tokenizer(recipe.tokens.tokenizer)
    make_stages(recipe)


def _check_empty(out: Path) -> None:
    # A process that was killed while it wrote the plan left its temporary file behind.
    remove_leftovers(out)
    others = sorted(path.name for path in out.iterdir() if path.name != "lock")
    if others:
        raise InputError(
            f"{str(out)!r} holds {others[0]!r} and no preparation to go on with: take a folder of "
            "its own for --out"
        )


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the folder for one process; the lock goes away with it, however that ends."""
    make_folder(out)
    with refused_as_input_error(out / "lock"):
        file = (out / "lock").open("ab", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise InputError(
                f"another process is preparing a corpus in {str(out)!r}: wait for it, or take "
                "another --out folder"
            ) from cause
        yield


def _run_here(out: Path, plan: Plan, watch: Watch) -> None:
    most = max(len(open_tasks(out, plan, phase)) for phase in PHASES)
    workers = min(plan.recipe.execution.workers, most)
    with ExitStack() as stack:
        pool = None
        if workers > 1:
            # Spawned: a fork would copy the threads of this process half.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, context))
        for phase in PHASES:
            tasks = open_tasks(out, plan, phase)
            if pool is None or len(tasks) < 2:
                _run_in_this_process(out, plan, phase, tasks, watch)
            else:
                _run_in_processes(pool, out, phase, tasks, watch)


def _run_in_this_process(
    out: Path, plan: Plan, phase: str, tasks: Sequence[int], watch: Watch
) -> None:
    by_bytes = phase in ("read", "tokenize")
    total = _bytes_of(plan, tasks) if by_bytes else len(tasks)
    done = 0

    def progress(amount: int) -> None:
        nonlocal done
        done += amount
        watch(phase, min(done, total), total, "bytes")

    for count, index in enumerate(tasks, 1):
        carry_out(out, plan, phase, index, progress)
        if not by_bytes:
            watch(phase, count, total, "tasks")


def _bytes_of(plan: Plan, tasks: Sequence[int]) -> int:
    return sum(unit.num_bytes for index in tasks for unit in plan.units[slice(*plan.tasks[index])])


def _run_in_processes(
    pool: ProcessPoolExecutor, out: Path, phase: str, tasks: Sequence[int], watch: Watch
) -> None:
    waiting: list[Future[None]] = [pool.submit(run_task, out, phase, index) for index in tasks]
    try:
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            watch(phase, done, len(tasks), "tasks")
    except BrokenProcessPool as cause:
        raise CapacityError(
            f"a process of the phase {phase!r} was ended from outside, most likely for want of "
            "memory: run the same command again, with fewer execution.workers"
        ) from cause
    finally:
        for future in waiting:
            future.cancel()
