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
    # --this-machine: a prediction takes seconds, and the plain answer must come at once.
    "jamba plan": 0,
    "jamba plan model": 8,
    # What is trained, on what, and how; the rest of a recipe does not change the plan.
    # --this-machine with --threads: no recipe is needed to ask how long a laptop would take.
    "jamba plan train": 11,
    # --measure takes seconds too; --weights says what is predicted.
    "jamba doctor": 3,
    "jamba init": 7,
    # --type and --dtype are one choice, but a folder and a file have other words for it.
    "jamba convert": 5,
    # --group is what a scheme leaves open; --calibrate is a text, and how much of it is how long it
    # takes; the rest are those of every command that writes.
    "jamba quantize": 9,
    # --quantize, here and below: trying a scheme must not need a second copy on the disk.
    # --draft, here and below, pays on some texts only; --chat and --system say what a prompt is.
    # --adapter, too: what an adapter does must be seen before it is merged.
    "jamba generate": 24,
    "jamba chat": 19,
    "jamba score": 8,
    "jamba bench": 12,
    "jamba train": 0,
    "jamba train run": 7,
    "jamba train plot": 2,
    "jamba train export": 2,
    # --dry-run shows what would be trained.
    "jamba finetune": 8,
    "jamba adapter": 0,
    "jamba adapter inspect": 1,
    "jamba adapter merge": 3,
    "jamba data": 0,
    "jamba data prepare": 3,
    # --verify reads every byte of a corpus, which may be hundreds of gigabytes.
    "jamba data inspect": 2,
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
