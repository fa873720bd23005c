"""What all recipe files have in common: sections of TOML, and values given beside the file.

Knows no section by name.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from jamba_lm.config_json import shown
from jamba_lm.errors import RecipeError
from jamba_lm.files import path_kind

MAXIMUM_RECIPE_BYTES = 2**20


def read_sections(path: Path, expected: str = "a TOML file") -> dict[str, Any]:
    """Read a recipe file.

    Raises:
        RecipeError: it is missing (`expected` says what would do), too long or not TOML.
    """
    if path_kind(path) != "file":
        raise RecipeError(f"no recipe at {str(path)!r}: expected {expected}")
    try:
        with path.open("rb") as file:
            data = file.read(MAXIMUM_RECIPE_BYTES + 1)
    except OSError as cause:
        raise RecipeError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause
    if len(data) > MAXIMUM_RECIPE_BYTES:
        raise RecipeError(
            f"recipe {str(path)!r} is longer than {MAXIMUM_RECIPE_BYTES:,} bytes: "
            "is it the right file?"
        )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except RecursionError as cause:
        raise RecipeError(f"recipe {str(path)!r} is not TOML: nested too deeply") from cause
    except ValueError as cause:
        reason = " ".join(str(cause).split())[:200]
        raise RecipeError(f"recipe {str(path)!r} is not TOML: {reason}") from cause


def assign(sections: dict[str, Any], assignment: str, example: str) -> None:
    """Change one value as `--set section.key=value` says.

    Args:
        sections: changed in place.
        assignment: the text after `--set`.
        example: one that would do, for the message.

    Raises:
        RecipeError: it is no assignment, or the section is no table.
    """
    name, equals, text = assignment.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"--set {assignment!r}: expected section.key=value, like {example}")
    if isinstance(sections.get(section), list):
        raise RecipeError(
            f"--set {assignment!r}: [[{section}]] is a list, so change it in the recipe file"
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (RecursionError, ValueError):
        # A word that needs no quotes on a command line: its key must then take text.
        value = text.strip()
    table = sections.setdefault(section, {})
    if not isinstance(table, dict):
        raise RecipeError(f"[{section}] must be a table, but the recipe says {shown(table)}")
    table[key] = value
