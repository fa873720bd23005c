"""The training loop: from a recipe to a trained model in a folder, resumable at any moment.

Knows no command line: whoever calls it is told of every record that goes to the log.

A run is its recipe, its data and the number of steps taken; the clock decides only when it is
saved. A process killed at any moment and resumed therefore ends with the same bits.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from jamba_lm.analysis.machine import usable_memory
from jamba_lm.errors import InputError, RecipeError
from jamba_lm.files import make_folder, write_atomic
from jamba_lm.kernels import ops
from jamba_lm.training.capacity import check_memory
from jamba_lm.training.checkpointing import Progress, SavedRun, checkpoints, read_checkpoint
from jamba_lm.training.export import export_newest
from jamba_lm.training.learner import Learner, plain_sections
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.pretraining import Pretraining
from jamba_lm.training.processes import Processes
from jamba_lm.training.recipe import SECTIONS, Recipe, RunRecipe
from jamba_lm.training.recipe_record import check_continuation, to_toml
from jamba_lm.training.run_folder import RunLog, only_run_in, write_record
from jamba_lm.training.saving import SharedSaver, SoloSaver
from jamba_lm.training.segments import PassProgress, nobody
from jamba_lm.training.task import Task
from jamba_lm.training.tensorboard_log import TensorBoardLog
from jamba_lm.training.together import Together
from jamba_lm.training.utilization import training_flops
from jamba_lm.training.validation import Validation

# Returns to one and the same checkpoint, after which the data is not to blame.
MOST_ROLL_BACKS = 3

Resume = Literal["never", "always", "auto"]
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        finished: whether all steps were taken; otherwise it was asked to stop, and saved.
        progress: how far the run has come.
        validation: of the last step; None when it was stopped before.
        model_folder: the exported folder; None when it was stopped before the end.
    """

    finished: bool
    progress: Progress
    validation: Validation | None
    model_folder: Path | None


def train(
    recipe: RunRecipe,
    folder: Path,
    *,
    task: Task | None = None,
    kinds: Mapping[str, type[Any]] = SECTIONS,
    resume: Resume = "never",
    backend: str | None = None,
    report: Report = lambda record: None,
    pass_progress: PassProgress = nobody,
    peak_flops: float | None = None,
    processes: Processes | None = None,
) -> Outcome:
    """Carry out `recipe` in `folder`, from the start or from the newest checkpoint there.

    The folder gets `recipe.toml` (resolved), `run.json` (versions, back-ends, seed), `log.jsonl`,
    `checkpoints/` and at the end `model/`, which Hugging Face transformers reads too. SIGINT and
    SIGTERM end the run after the current step, with a checkpoint.

    Args:
        recipe: what to do.
        folder: made when missing.
        task: where the run starts and what it leaves; None makes a model of fresh weights.
        kinds: the classes of the recipe's sections, by name.
        resume: "never" refuses a folder that holds a run, "always" one that holds none.
        backend: kernel back-end by name; None takes the fastest that can.
        report: told of every record of the log.
        pass_progress: told how far a pass in segments is, which may take hours.
        peak_flops: of this machine's matrix products, a second; steps are then logged with the
            share of it that the model's own products come to.
        processes: those that carry it out together, each with a call of its own; None is this
            process alone.

    Raises:
        InputError: the folder is in use, holds a run or holds none (see `resume`), or cannot be
            written to; the newest checkpoint is whole in any case.
        RecipeError: the recipe does not fit its tokenizer, the run to resume or the number of
            processes, or training diverged.
        DataError: text is missing or unusable, or is not what the run to resume was reading.
        CheckpointError: the newest checkpoint is damaged.
        CapacityError: weights, gradients and optimizer are larger than this machine's memory.
        FailedElsewhereError: it went wrong in another process, or in all of them, and the first
            one says how.
    """
    processes = processes or Processes()
    processes.all_or_none(lambda: _check(recipe, backend, processes))
    if task is None:
        assert isinstance(recipe, Recipe), "only a Recipe says how fresh weights are made"
        task = Pretraining(recipe)
    with ExitStack() as stack:
        lock = only_run_in(folder) if processes.leads else nullcontext()
        processes.all_or_none(lambda: stack.enter_context(lock))
        saved = processes.all_or_none(lambda: _find_run(folder, resume))
        changed = processes.all_or_none(
            lambda: check_continuation(saved.recipe, plain_sections(recipe), kinds) if saved else []
        )
        # The first process tokenizes, the others then find what it has kept.
        start = processes.leader_first(lambda: task.start(folder))
        together = Together(processes, recipe.parallel)
        learner = Learner(recipe, backend, folder, together, start, pass_progress)
        if saved:
            processes.all_or_none(lambda: learner.restore(saved))
        log = processes.all_or_none(lambda: _open_log(stack, recipe, folder, learner, processes))
        told: list[Report] = []
        if log is not None:
            told = [log.write, report]
            if recipe.watch.tensorboard:
                board = TensorBoardLog(folder, learner.progress.steps_done)
                told.append(stack.enter_context(board).write)
        stop = stack.enter_context(_stop_signals(once=processes.count == 1))
        run = _Run(recipe, folder, learner, task, processes, log, stop, told, peak_flops)
        return run.go(changed)


def _check(recipe: RunRecipe, backend: str | None, processes: Processes) -> None:
    ops.require(backend)
    layout, workers = recipe.parallel, recipe.training.workers
    if isinstance(recipe, Recipe):
        layout.validate(recipe.model, processes.count)
        if processes.device.type == "cpu":
            check_memory(recipe, usable_memory())
    elif processes.count > 1:
        raise RecipeError(
            f"fine-tuning runs in one process, not in {processes.count}: start it without torchrun"
        )
    if recipe.training.segment_tokens and processes.spread:
        raise RecipeError(
            f"training.segment_tokens is {recipe.training.segment_tokens:,}, but only a run in one "
            "process reads its passes in segments: leave it out"
        )
    if workers > 1 and processes.spread:
        raise RecipeError(
            f"training.workers is {workers}, but workers share the CPU threads of one process: "
            "set it to 1, and start more processes"
        )
    if layout.sequence and recipe.loss.activation_coef:
        raise RecipeError(
            "loss.activation_coef and parallel.sequence are both given, but processes that share "
            "rows see no whole layer output: leave one out"
        )


def _open_log(
    stack: ExitStack, recipe: RunRecipe, folder: Path, learner: Learner, processes: Processes
) -> RunLog | None:
    """Write down what is run, and open its log; both in the first process only."""
    if not processes.leads:
        return None
    make_folder(folder / "checkpoints")
    write_atomic(folder / "recipe.toml", lambda file: _write(file, to_toml(recipe)))
    write_record(folder, learner.record())
    return stack.enter_context(RunLog(folder, learner.progress.log_bytes))


def _write(file: Any, text: str) -> None:
    file.write(text.encode("utf-8"))


def _find_run(folder: Path, resume: Resume) -> SavedRun | None:
    found = checkpoints(folder / "checkpoints")
    started = (folder / "log.jsonl").exists() or bool(found)
    if resume == "never" and started:
        raise InputError(
            f"{str(folder)!r} already holds a run: resume it with --resume, or take another --out"
        )
    if resume == "always" and not started:
        raise InputError(f"no run to resume in {str(folder)!r}: start one without --resume")
    return read_checkpoint(found[-1]) if found else None


class _Run:
    """The loop around a `Learner`: when to validate, save, report and stop."""

    def __init__(
        self,
        recipe: RunRecipe,
        folder: Path,
        learner: Learner,
        task: Task,
        processes: Processes,
        log: RunLog | None,
        stop: threading.Event,
        told: Sequence[Report],
        peak_flops: float | None,
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._learner = learner
        self._task = task
        self._processes = processes
        self._log = log
        self._stop = stop
        self._told = told
        self._peak = None if peak_flops is None else peak_flops * processes.count
        self._saver = _saver(folder / "checkpoints", recipe.checkpoint.keep, processes)
        self._rolled_back, self._rolled_back_to = 0, Path()
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._last: Validation | None = None

    def go(self, changed: list[str]) -> Outcome:
        learner, steps = self._learner, self._recipe.training.steps
        if changed:
            self._note({"event": "changed", "step": learner.progress.steps_done, "keys": changed})
        if self._recipe.watch.spike == "rolled back" and not self._has_checkpoint():
            self._save()
        while learner.progress.steps_done < steps and not self._asked_to_stop():
            if self._step().get("spike") == "rolled back":
                self._roll_back()
                continue
            step = learner.progress.steps_done
            if step % self._recipe.validation.every_steps == 0 or step == steps:
                self._validate()
            self._save_if_due()
        if self._saved_step != learner.progress.steps_done:
            self._save()
        self._saver.settle()
        finished = learner.progress.steps_done == steps
        if finished and self._last is None:
            self._last = learner.validate()
        return Outcome(
            finished=finished,
            progress=learner.progress,
            validation=self._last,
            model_folder=self._export() if finished else None,
        )

    def _asked_to_stop(self) -> bool:
        """Say whether any process was asked to stop; on the way, let a saved checkpoint appear."""
        found = self._processes.gather([self._stop.is_set(), self._saver.written])
        if self._saver.pending and all(written for _, written in found):
            self._saver.settle()
        return any(stop for stop, _ in found)

    def _step(self) -> Mapping[str, Any]:
        """Take a step, log it, and return its record."""
        learner, before = self._learner, self._learner.progress
        every = self._recipe.watch.every_steps
        started = time.perf_counter()
        record, *more = learner.step(watch=bool(every) and (before.steps_done + 1) % every == 0)
        seconds = time.perf_counter() - started
        tokens = learner.progress.tokens_seen - before.tokens_seen
        speed: dict[str, Any] = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if self._peak is not None:
            flops = training_flops(self._learner.decoder.config, tokens)
            speed["mfu"] = round(flops / seconds / self._peak, 4)
        self._note({**record, **speed})
        for one in more:
            self._note(one)
        return record

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, with the data moved on.

        Raises:
            RecipeError: it did not help before.
        """
        self._saver.settle()
        newest = checkpoints(self._folder / "checkpoints")[-1]
        self._rolled_back = self._rolled_back + 1 if newest == self._rolled_back_to else 1
        self._rolled_back_to = newest
        step = self._learner.progress.steps_done
        if self._rolled_back > MOST_ROLL_BACKS:
            raise RecipeError(
                f"the loss spiked again after {MOST_ROLL_BACKS} returns to {newest.name}: lower "
                f"optimizer.learning_rate (now {self._recipe.optimizer.learning_rate:g}) and "
                "start in another --out folder"
            )
        saved = read_checkpoint(newest)
        self._learner.roll_back(saved)
        self._note({"event": "rolled back", "step": step, "to_step": saved.progress.steps_done})

    def _note(self, record: Mapping[str, Any]) -> None:
        for report in self._told:
            report(record)

    def _validate(self) -> None:
        started = time.perf_counter()
        self._last = self._learner.validate()
        seconds = round(time.perf_counter() - started, 4)
        step = self._learner.progress.steps_done
        self._note({"event": "validation", "step": step, **asdict(self._last), "seconds": seconds})

    def _has_checkpoint(self) -> bool:
        return bool(checkpoints(self._folder / "checkpoints"))

    def _save_if_due(self) -> None:
        rules, step = self._recipe.checkpoint, self._learner.progress.steps_done
        due = bool(rules.every_steps) and step % rules.every_steps == 0
        if not due and rules.every_seconds:
            # The first process has the clock.
            waited = time.monotonic() - self._saved_at
            due = bool(self._processes.gather([waited >= rules.every_seconds])[0][0])
        if due:
            self._save()

    def _save(self) -> None:
        saved = self._learner.save(0 if self._log is None else self._log.sync())
        self._saver.save(saved)
        self._saved_step, self._saved_at = saved.progress.steps_done, time.monotonic()

    def _export(self) -> Path:
        folder = self._folder / self._task.output
        optimizer = self._learner.optimizer
        if isinstance(optimizer, MasterAdamW):
            self._task.export(optimizer, folder)
        elif self._processes.leads:
            assert isinstance(self._recipe, Recipe), "`_check` lets no other kind be spread"
            export_newest(self._recipe, self._folder, folder)
        return folder


def _saver(folder: Path, keep: int, processes: Processes) -> SoloSaver | SharedSaver:
    return SharedSaver(folder, keep, processes) if processes.spread else SoloSaver(folder, keep)


@contextmanager
def _stop_signals(*, once: bool) -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event.

    Args:
        once: the second one acts as it always does. Processes of several hear of the same wish
            more than once, from the terminal and from torchrun, which ends them by other means
            when they take too long.
    """
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _: FrameType | None) -> None:
        stop.set()
        if once:
            signal.signal(number, before[signal.Signals(number)])

    # Python lets only the main thread handle signals; in another one the caller keeps them.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
