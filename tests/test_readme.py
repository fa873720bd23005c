"""Documentation that cannot rot: its commands run, and what it names exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import FIELDS
from tests.documents import DOCUMENTS, ROOT, Sandbox, blocks, matches

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
KINDS = {"console", "python", "sh", "toml", "json", "text", ""}


def having(kind: str) -> list[Path]:
    return [document for document in DOCUMENTS if any(b.kind == kind for b in blocks(document))]


@pytest.mark.parametrize("document", having("console"), ids=lambda p: p.name)
def test_commands_print_what_the_document_shows(document, tmp_path):
    sandbox = Sandbox(tmp_path / "sandbox")
    for block in blocks(document):
        if block.kind != "console":
            continue
        for command, shown in block.commands():
            run = sandbox.run(command)
            assert run.returncode == 0, f"$ {command}\n{run.stdout}"
            assert run.stdout.strip() or not shown.strip(), f"$ {command} printed nothing"
            if shown.strip() and not block.varies:
                assert matches(shown, run.stdout), (
                    f"$ {command}\nshown:\n{shown}\nprinted:\n{run.stdout}"
                )


@pytest.mark.parametrize("document", having("python"), ids=lambda p: p.name)
def test_python_examples_run(document, tmp_path):
    code = "\n".join(block.body for block in blocks(document) if block.kind == "python")
    run = Sandbox(tmp_path / "sandbox").run_python(code)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("document", having("sh"), ids=lambda p: p.name)
def test_set_up_commands_name_things_that_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for block in blocks(document):
        if block.kind != "sh":
            continue
        for target in re.findall(r"\bmake ([a-z]+)", block.body):
            assert target in targets, f"{document.name} says `make {target}`"
        for module in re.findall(r"-m (benchmarks\.\w+|tests\.\w+)", block.body):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@every_document
def test_blocks_are_of_a_known_kind(document):
    unknown = {block.kind for block in blocks(document)} - KINDS
    assert not unknown, f"{document.name} has blocks of kind {unknown}, which nobody checks"


@every_document
def test_links_inside_the_repository_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


FILE_NAMES = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|cpp|h|json))`")


@every_document
def test_files_that_are_named_exist(document):
    if document.name == "log.md":
        return
    for name in FILE_NAMES.findall(document.read_text(encoding="utf-8")):
        places = [ROOT / name, ROOT / "src" / "jamba_lm" / name, document.parent / name]
        assert any(place.exists() for place in places), f"{document.name} names {name}"


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        if document.parent != ROOT and document.name != "README.md":
            name = document.relative_to(ROOT / "docs").as_posix()
            assert f"({name})" in index, f"docs/README.md does not list {name}"


def test_the_notation_has_every_field_of_a_config():
    text = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
    for field in fields(JambaConfig):
        assert f"`{field.name}`" in text, f"docs/notation.md lacks {field.name}"
    for key in FIELDS:
        assert f"`{key}`" in text, f"docs/notation.md lacks {key}"


def test_output_may_be_shortened_with_dots_and_not_changed():
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("a\n", "a")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a\n...\nd\n", "a\nb\nc\n")
