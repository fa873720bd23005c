"""The phases of a preparation as datatrove's pipelines: on this machine, under Slurm or on Ray.

A pipeline has one step, which carries out the task of its rank. Which tasks are done is our own
record, so that any executor goes on where another was stopped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jamba_lm.config_json import closest, shown
from jamba_lm.corpus.phases import PHASES, num_tasks, open_tasks, run_task
from jamba_lm.corpus.plan import Plan
from jamba_lm.errors import BackendUnavailable, RecipeError

_KINDS = {
    "datatrove-local": ("local", "LocalPipelineExecutor"),
    "slurm": ("slurm", "SlurmPipelineExecutor"),
    "ray": ("ray", "RayPipelineExecutor"),
}
# What datatrove writes about its own work; kept, for a cluster's failures are looked for there.
LOGS = "logs"
# Ours to give.
_OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed")


class TaskStep:
    """What a pipeline consists of: anything that can be called with a rank is a step to datatrove.

    Attributes:
        out: folder of the preparation, which every machine must see under this name.
        phase: whose tasks are carried out.
    """

    def __init__(self, out: str, phase: str) -> None:
        self.out = out
        self.phase = phase

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Carry out the task of this rank."""
        run_task(Path(self.out), self.phase, rank)
        return iter(())


def run_with_datatrove(out: Path, plan: Plan) -> bool:
    """Run all phases, or hand them over.

    Args:
        out: folder of the preparation.
        plan: of the preparation.

    Returns:
        Whether all of it is done; under Slurm the jobs have only been submitted.

    Raises:
        BackendUnavailable: datatrove or Ray is missing.
        RecipeError: the executor takes no such option.
        JambaError: a task failed.
    """
    execution = plan.recipe.execution
    kind = _executor(execution.executor)
    parameters = [name for name in inspect.signature(kind.__init__).parameters if name not in _OURS]
    for key in execution.options:
        if key not in parameters:
            hint = closest(key, parameters) or f"; known: {', '.join(parameters)}"
            raise RecipeError(f"unknown key in execution.options: {shown(key)}{hint}")
    before = None
    for phase in PHASES:
        if not open_tasks(out, plan, phase):
            continue
        options = dict(execution.options)
        if execution.executor == "slurm":
            options.setdefault("job_name", f"jamba-{phase}")
        try:
            executor = kind(
                pipeline=[TaskStep(str(out.absolute()), phase)],
                tasks=num_tasks(plan, phase),
                workers=min(execution.workers, num_tasks(plan, phase)),
                logging_dir=str(out.absolute() / LOGS / phase),
                # Slurm's jobs wait for each other; the other executors return when they are done.
                depends=before if execution.executor == "slurm" else None,
                skip_completed=False,
                **options,
            )
        except (TypeError, ValueError) as cause:
            reason = " ".join(str(cause).split())[:200]
            raise RecipeError(f"execution.options: {kind.__name__} says: {reason}") from cause
        executor.run()
        before = executor
    return execution.executor != "slurm"


def _executor(name: str) -> Any:
    module, kind = _KINDS[name]
    needed = {"datatrove": "jamba-lm[data]", **({"ray": "ray[default]"} if name == "ray" else {})}
    for package, install in needed.items():
        if find_spec(package) is None:
            raise BackendUnavailable(
                f"execution.executor = {name!r} needs {package}: install it with "
                f"`pip install '{install}'`"
            )
    return getattr(import_module(f"datatrove.executor.{module}"), kind)
