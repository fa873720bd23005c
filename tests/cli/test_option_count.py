"""The command line does not grow by itself: what can be set belongs in a recipe or a config."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from jamba_lm.cli.main import app

# How many options each command has. A number here may fall; to raise one, say in the change why
# the option cannot be a line in a recipe, a `--set`, or the one right thing to do.
OPTIONS = {
    "jamba": 1,
    "jamba inspect": 2,
    "jamba plan": 7,
    "jamba doctor": 1,
    "jamba init": 7,
    "jamba generate": 19,
    "jamba chat": 16,
    "jamba score": 6,
    "jamba bench": 9,
    "jamba train": 7,
    "jamba tokenizer": 0,
    "jamba tokenizer train": 7,
    "jamba tokenizer encode": 3,
    "jamba tokenizer decode": 2,
    "jamba tokenizer report": 2,
}


def commands() -> dict[str, Any]:
    """Map every command, by its full name, to what typer made of it."""
    found: dict[str, Any] = {}

    def walk(name: str, command: Any) -> None:
        found[name] = command
        for child, below in getattr(command, "commands", {}).items():
            walk(f"{name} {child}", below)

    walk("jamba", typer.main.get_command(app))
    return found


def options_of(command: Any) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "option"]


def test_no_command_gains_options_unnoticed():
    assert {name: len(options_of(command)) for name, command in commands().items()} == OPTIONS


@pytest.mark.parametrize("name", commands())
def test_every_option_says_what_it_is_for(name):
    command = commands()[name]
    assert command.help, f"{name} says nothing about itself"
    for option in options_of(command):
        sentence = getattr(option, "help", None) or ""
        assert len(sentence) > 10, f"{name} {option.opts[0]}: {sentence!r}"
        assert sentence.endswith((".", ")", "?")), f"{name} {option.opts[0]}: {sentence!r}"
