"""What a preparation reads and how the reading is cut: decided once, then held to.

Finds the files of a recipe's sources, and notices when they are not what they were. Knows nothing
of what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.corpus.decontamination import evaluation_files
from jamba_lm.corpus.patterns import matching_files
from jamba_lm.corpus.recipe import CorpusRecipe, Source, result_digest
from jamba_lm.corpus.recipe_file import build_corpus_recipe
from jamba_lm.errors import DataError, InputError
from jamba_lm.files import path_kind, read_json, write_json

PLAN = "plan.json"
FORMAT = "jamba_lm preparation 1"
TASK_BYTES = 64 * 2**20
_PLAN_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that one task reads from its beginning to its end.

    Attributes:
        source: number of the source in the recipe.
        path: the file; for datatrove's readers what they call it, empty when they have no files.
        num_bytes: its size, 0 when unknown.
        modified_ns: when it was last changed, 0 when unknown.
    """

    source: int
    path: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A preparation, before any of it is done.

    Attributes:
        recipe: what to do.
        units: what to read, in the order of the sources, then of the paths.
        tasks: for each task the first of its units and the one past its last.
        protected: the evaluation files and the models that stages read.
    """

    recipe: CorpusRecipe
    units: tuple[Unit, ...]
    tasks: tuple[tuple[int, int], ...]
    protected: tuple[Unit, ...]

    @property
    def num_bytes(self) -> int:
        """Size of everything that is read."""
        return sum(unit.num_bytes for unit in self.units)


def make_plan(recipe: CorpusRecipe) -> Plan:
    """Look at the files and cut the work.

    Raises:
        DataError: a source has no files, or one of them cannot be read.
    """
    units: list[Unit] = []
    for number, source in enumerate(recipe.source):
        found = _units_of(number, source)
        if not found:
            raise DataError(f"source {source.name!r} has no input: {source.reader} finds no file")
        units += found
    protected = [Path(recipe.tokens.tokenizer)] if Path(recipe.tokens.tokenizer).is_file() else []
    if recipe.decontaminate is not None:
        protected += evaluation_files(recipe.decontaminate)
    if recipe.language is not None:
        protected.append(Path(recipe.language.model))
    return Plan(
        recipe,
        tuple(units),
        _cut(units, recipe.execution.tasks),
        tuple(_file_unit(-1, path) for path in protected),
    )


def _units_of(number: int, source: Source) -> list[Unit]:
    if source.format == "datatrove":
        from jamba_lm.corpus.datatrove_reading import list_inputs

        return [Unit(number, path, size, 0) for path, size in list_inputs(source)]
    paths: set[Path] = set()
    for pattern in source.files:
        found = matching_files(pattern)
        if not found:
            raise DataError(
                f"source {source.name!r}: there is no file at {pattern!r}; check the pattern, "
                "which is relative to the recipe"
            )
        paths.update(found)
    return [_file_unit(number, path) for path in sorted(paths)]


def _file_unit(number: int, path: Path) -> Unit:
    try:
        status = path.stat()
    except OSError as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause
    return Unit(number, str(path), status.st_size, status.st_mtime_ns)


def _cut(units: Sequence[Unit], wanted: int) -> tuple[tuple[int, int], ...]:
    total = sum(unit.num_bytes for unit in units)
    count = wanted or -(-total // TASK_BYTES)
    share = total / max(1, min(count, len(units)))
    tasks: list[tuple[int, int]] = []
    first = done = 0
    for number, unit in enumerate(units):
        done += unit.num_bytes
        if done >= share * (len(tasks) + 1) or number == len(units) - 1:
            tasks.append((first, number + 1))
            first = number + 1
    return tuple(tasks)


def check_unchanged(unit: Unit) -> None:
    """Compare a file with what the plan says of it.

    Raises:
        DataError: it is another, or gone.
    """
    if not unit.modified_ns:
        return
    if path_kind(unit.path) != "file":
        raise DataError(
            f"{unit.path!r} was there when this preparation began and is gone: bring it back, or "
            "start in another --out folder"
        )
    now = _file_unit(unit.source, Path(unit.path))
    if now != unit:
        what = (
            f"{unit.num_bytes:,} bytes, now {now.num_bytes:,}"
            if now.num_bytes != unit.num_bytes
            else "the same size, written anew"
        )
        raise DataError(
            f"{unit.path!r} has changed since this preparation began ({what}): bring the old file "
            "back, or start in another --out folder"
        )


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan to the folder of the preparation.

    Raises:
        InputError: the system refused.
    """
    value = {
        "format": FORMAT,
        "recipe": plan.recipe.to_dict(),
        "units": [[u.source, u.path, u.num_bytes, u.modified_ns] for u in plan.units],
        "tasks": [list(task) for task in plan.tasks],
        "protected": [[u.source, u.path, u.num_bytes, u.modified_ns] for u in plan.protected],
    }
    write_json(folder / PLAN, value)


def read_plan(folder: Path) -> Plan:
    """Read the plan of a preparation.

    Raises:
        DataError: it is missing or damaged.
    """
    value = read_json(folder / PLAN, "preparation plan", DataError, _PLAN_BYTES)
    try:
        if value["format"] != FORMAT:
            raise DataError(
                f"{str(folder / PLAN)!r} is of another version: its format is "
                f"{value['format']!r}, expected {FORMAT!r}; take another --out folder"
            )
        # Paths are absolute by now, so the folder they are relative to does not matter.
        recipe = build_corpus_recipe(_without_unused(value["recipe"]), Path("/"))
        return Plan(
            recipe,
            tuple(Unit(*unit) for unit in value["units"]),
            tuple((first, last) for first, last in value["tasks"]),
            tuple(Unit(*unit) for unit in value["protected"]),
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise DataError(
            f"{str(folder / PLAN)!r} is not what a preparation writes: take another --out folder"
        ) from cause


def _without_unused(sections: Mapping[str, Any]) -> dict[str, Any]:
    used = {stage for source in sections["source"] for stage in source["stages"]}
    kept: dict[str, Any] = {}
    for name, value in sections.items():
        if value is None or (name in _OPTIONAL and name not in used):
            continue
        kept[name] = value["options"] if name in _FILTERS else value
    return kept


_FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
_OPTIONAL = (*_FILTERS, "fix_text", "language", "code", "pii", "decontaminate")


def check_same(old: Plan, new: Plan, folder: Path) -> None:
    """Make sure that `folder` may go on with `new`.

    Raises:
        InputError: another recipe was used there.
        DataError: the files are not what they were.
    """
    before, now = old.recipe.to_dict(), new.recipe.to_dict()
    if result_digest(before) != result_digest(now):
        names = [name for name in now if name != "execution" and before[name] != now[name]]
        raise InputError(
            f"{str(folder)!r} holds a preparation with another recipe: [{'], ['.join(names)}] "
            "differ; go back to the old recipe, or take another --out folder"
        )
    ours = {unit.path: unit for unit in (*old.units, *old.protected)}
    theirs = {unit.path: unit for unit in (*new.units, *new.protected)}
    for path in [*ours.keys() - theirs.keys(), *theirs.keys() - ours.keys()]:
        verb = "gone" if path in ours else "new"
        raise DataError(
            f"{path!r} is {verb} since this preparation began: put the files back as they were, "
            "or start in another --out folder"
        )
    for unit in (*old.units, *old.protected):
        check_unchanged(unit)
