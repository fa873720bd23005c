"""Reads a recipe strictly: what is unknown, contradictory or out of range is an error.

Knows the sections of `recipe.py`, and nothing of what they mean.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jamba_lm.config_json import closest, shown
from jamba_lm.corpus.patterns import absolute_pattern
from jamba_lm.corpus.recipe import (
    DEMO_TOKENIZER,
    ENCODINGS,
    EXECUTORS,
    FORMATS,
    STAGES,
    CodeSection,
    CorpusRecipe,
    DecontaminateSection,
    DocumentsSection,
    DuplicatesSection,
    ExecutionSection,
    FilterOptions,
    FixTextSection,
    LanguageSection,
    PiiSection,
    ReportSection,
    Source,
    SplitSection,
    TokensSection,
)
from jamba_lm.errors import RecipeError
from jamba_lm.files import path_kind
from jamba_lm.recipe_sections import assign, read_sections

SECTIONS: Mapping[str, type[Any]] = {
    "documents": DocumentsSection,
    "fix_text": FixTextSection,
    "language": LanguageSection,
    "gopher_repetition": FilterOptions,
    "gopher_quality": FilterOptions,
    "c4": FilterOptions,
    "fineweb": FilterOptions,
    "code": CodeSection,
    "pii": PiiSection,
    "decontaminate": DecontaminateSection,
    "duplicates": DuplicatesSection,
    "split": SplitSection,
    "tokens": TokensSection,
    "report": ReportSection,
    "execution": ExecutionSection,
}
# Without these there is no default that could be meant.
NEEDED_WHEN_USED = ("language", "decontaminate")

# The range of every number, ends included.
_RANGES: Mapping[str, tuple[float, float]] = {
    "source.weight": (0.0, 1e9),
    "documents.maximum_bytes": (1, 2**34),
    "documents.minimum_characters": (1, 2**32),
    "language.minimum_score": (0.0, 1.0),
    "code.maximum_line_characters": (1, 2**32),
    "code.maximum_mean_line_characters": (1, 2**32),
    "code.minimum_alphanumeric": (0.0, 1.0),
    "code.maximum_encoded": (0.0, 1.0),
    "decontaminate.ngram": (2, 100),
    "decontaminate.minimum_words": (2, 100),
    "decontaminate.allowed_matches": (0, 10**9),
    "duplicates.ngram": (1, 100),
    "duplicates.bands": (1, 256),
    "duplicates.rows": (1, 256),
    "duplicates.threshold": (0.0, 1.0),
    "split.validation": (0.0, 0.5),
    "tokens.shard_tokens": (1024, 2**34),
    "report.samples": (0, 100),
    "report.sample_characters": (40, 10**5),
    "execution.workers": (1, 4096),
    "execution.tasks": (0, 10**5),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "source.format": FORMATS,
    "source.encoding": ENCODINGS,
    "source.stages": STAGES,
    "documents.unusable": ("drop", "stop"),
    "fix_text.normalization": ("NFC", "NFKC", "NFD", "NFKD", "none"),
    "pii.kinds": ("email", "ip", "card", "phone"),
    "execution.executor": EXECUTORS,
}
_MAY_BE_EMPTY = ("source.separator", "source.reader", "source.files", "source.stages")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def load_corpus_recipe(path: Path, assignments: Sequence[str] = ()) -> CorpusRecipe:
    """Read a recipe file, change it as `--set section.key=value` says, and check everything.

    A folder stands for a recipe that takes every file in it that a source can read.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown (the message names the
            closest known one), a value is missing, of the wrong kind or out of range, or two of
            them contradict each other.
    """
    if path_kind(path) == "folder":
        sections: dict[str, Any] = {
            "source": [{"name": "text", "files": ["**/*"]}],
            "split": {"validation": 0.02},
        }
        folder = path
    else:
        sections, folder = read_sections(path, "a TOML file, or a folder of documents"), path.parent
    for assignment in assignments:
        assign(sections, assignment, "duplicates.near=false")
    return build_corpus_recipe(sections, folder)


def build_corpus_recipe(sections: Mapping[str, Any], folder: Path) -> CorpusRecipe:
    """Check plain sections and make paths absolute, relative ones being relative to `folder`.

    Raises:
        RecipeError: as in `load_corpus_recipe`.
    """
    _check_keys(sections, ["source", *SECTIONS], "section")
    for name, value in sections.items():
        if name != "source" and not isinstance(value, Mapping):
            raise RecipeError(f"[{name}] must be a table, but the recipe says {shown(value)}")
    given = sections.get("source")
    if not isinstance(given, list) or not given:
        raise RecipeError("the recipe has no [[source]]: expected at least one list of files")
    sources = tuple(_build_source(value, number) for number, value in enumerate(given, 1))
    built: dict[str, Any] = {
        name: _build(name, kind, sections[name])
        for name, kind in SECTIONS.items()
        if name in sections
    }
    recipe = CorpusRecipe(source=sources, **built)
    _check_together(recipe, set(sections))
    return _with_paths(recipe, folder)


def _build_source(value: object, number: int) -> Source:
    if not isinstance(value, Mapping):
        raise RecipeError(f"[[source]] number {number} is {shown(value)}: expected a table")
    source: Source = _build("source", Source, value)
    if not _NAME.fullmatch(source.name):
        raise RecipeError(
            f"source.name is {shown(source.name)}: expected up to 40 small letters, digits, "
            "hyphens and underscores, for it becomes part of file names"
        )
    return source


def _build(name: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    if kind is FilterOptions:
        # The filter itself says which options it has.
        return FilterOptions(options=dict(values))
    fields = {one.name: one for one in dataclasses.fields(kind)}
    _check_keys(values, list(fields), f"key in [{name}]")
    for key, one in fields.items():
        missing = dataclasses.MISSING
        if one.default is missing and one.default_factory is missing and key not in values:
            raise RecipeError(f"[{name}] needs {key}: {_expected(f'{name}.{key}', str(one.type))}")
    return kind(
        **{
            key: _check_value(f"{name}.{key}", str(fields[key].type), value)
            for key, value in values.items()
        }
    )


def _check_keys(given: Iterable[object], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            hint = closest(key, known) or f"; known: {', '.join(known)}"
            raise RecipeError(f"unknown {what}: {shown(key)}{hint}")


def _check_value(name: str, kind: str, value: Any) -> Any:
    choices = _CHOICES.get(name)
    if kind.startswith("tuple"):
        good = isinstance(value, list | tuple) and all(map(_is_text, value))
        if good and choices is not None:
            _check_keys(value, choices, f"entry in {name}")
        if good and (value or name in _MAY_BE_EMPTY):
            if len(set(value)) < len(value):
                raise RecipeError(f"{name} names something twice: {shown(value)}")
            return tuple(value)
    elif kind.startswith("Mapping"):
        if isinstance(value, Mapping):
            return dict(value)
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if (_is_text(value) or (value == "" and name in _MAY_BE_EMPTY)) and (
            choices is None or value in choices
        ):
            return value
    elif not isinstance(value, bool) and isinstance(value, int if kind == "int" else (int, float)):
        low, high = _RANGES[name]
        if math.isfinite(value) and low <= value <= high:
            return value if kind == "int" else float(value)
    raise RecipeError(f"{name} is {shown(value)}: expected {_expected(name, kind)}")


def _is_text(value: object) -> bool:
    # No path and no choice holds a null character, and the system refuses one with a ValueError.
    return isinstance(value, str) and bool(value) and "\0" not in value


def _expected(name: str, kind: str) -> str:
    if name in _CHOICES:
        words = " or ".join(map(repr, _CHOICES[name]))
        return f"a list of {words}" if kind.startswith("tuple") else words
    plain = kind.split("[")[0]
    if plain in _KINDS:
        return _KINDS[plain]
    low, high = _RANGES[name]
    return f"{'a whole number' if kind == 'int' else 'a number'} from {low:g} to {high:g}"


_KINDS: Mapping[str, str] = {
    "tuple": "a list of texts, at least one",
    "Mapping": "a table",
    "bool": "true or false",
    "str": "a text",
}


def _check_together(recipe: CorpusRecipe, given: set[str]) -> None:
    names = [source.name for source in recipe.source]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two sources are called {name!r}: give each a name of its own")
    used = recipe.used_stages()
    for stage in STAGES:
        if stage in given and stage not in used:
            raise RecipeError(
                f"[{stage}] is given, but no source passes it: add {stage!r} to the stages of a "
                "source, or leave the section out"
            )
        if stage in NEEDED_WHEN_USED and stage in used and stage not in given:
            raise RecipeError(
                f"a source passes {stage!r}, but there is no [{stage}] section, and it has no "
                "defaults that could be meant"
            )
    for source in recipe.source:
        _check_source(source)
    if not any(source.weight for source in recipe.source):
        raise RecipeError("every source has the weight 0: nothing would be trained on")
    duplicates = recipe.duplicates
    if not duplicates.near:
        # A dial that turns nothing is a mistake somewhere.
        usual = DuplicatesSection()
        for key in ("ngram", "bands", "rows", "threshold"):
            if getattr(duplicates, key) != getattr(usual, key):
                raise RecipeError(
                    f"duplicates.{key} is given, but duplicates.near is false: leave one out"
                )
    options = recipe.decontaminate
    if options is not None and options.minimum_words > options.ngram:
        raise RecipeError(
            f"decontaminate.minimum_words is {options.minimum_words} and ngram {options.ngram}: "
            "a text of ngram words is always looked for, so lower minimum_words"
        )
    if recipe.execution.executor == "local" and recipe.execution.options:
        raise RecipeError(
            "execution.options are for datatrove's executors, but execution.executor is 'local'"
        )


def _check_source(source: Source) -> None:
    where = f"source {source.name!r}"
    by_datatrove = source.format == "datatrove"
    if by_datatrove and (source.files or not source.reader):
        raise RecipeError(
            f"{where} has format 'datatrove': give the name of a reader and its reader_options, "
            "and no files"
        )
    if not by_datatrove and (source.reader or source.reader_options):
        raise RecipeError(f"{where} has a reader, but its format is not 'datatrove'")
    if not by_datatrove and not source.files:
        raise RecipeError(f"{where} needs files: a list of patterns, at least one")
    if source.format not in ("auto", "text") and (source.separator or source.encoding != "utf-8"):
        raise RecipeError(
            f"{where} has format {source.format!r}: separator and encoding are for plain text"
        )
    if source.format == "text" and source.field != "text":
        raise RecipeError(f"{where} has format 'text', which has no fields: leave field out")


def _with_paths(recipe: CorpusRecipe, folder: Path) -> CorpusRecipe:
    def absolute(path: str) -> str:
        # Not resolved: a link should keep its name.
        return str(folder.absolute() / path)

    def patterns(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(absolute_pattern(folder, pattern) for pattern in given)

    changes: dict[str, Any] = {
        "source": tuple(
            dataclasses.replace(source, files=patterns(source.files)) for source in recipe.source
        )
    }
    if recipe.tokens.tokenizer != DEMO_TOKENIZER:
        changes["tokens"] = dataclasses.replace(
            recipe.tokens, tokenizer=absolute(recipe.tokens.tokenizer)
        )
    if recipe.language is not None:
        changes["language"] = dataclasses.replace(
            recipe.language, model=absolute(recipe.language.model)
        )
    if recipe.decontaminate is not None:
        changes["decontaminate"] = dataclasses.replace(
            recipe.decontaminate, files=patterns(recipe.decontaminate.files)
        )
    return dataclasses.replace(recipe, **changes)
