"""What every file of the repository owes: readable, finished, and free of anyone's machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZE_LIMIT = 500_000
# The embedded model is the one large thing in the repository; the issue of its size is in its card.
LARGE_FILES = {"src/jamba_lm/embedded/model.safetensors": 16 * 1024 * 1024}

BINARY = {".safetensors", ".gguf", ".png", ".xz", ".gz"}
# Links are few and lead to places that last. A package index or a mirror is nobody's business.
KNOWN_HOSTS = {
    "arxiv.org",
    "doi.org",
    "github.com",
    "huggingface.co",
    "json-schema.org",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
    "creativecommons.org",
    "www.gnu.org",
    "127.0.0.1",
    "localhost",
}


def repository_files() -> list[str]:
    """List what git tracks or would track; a copy without git has nothing to check here."""
    if not (ROOT / ".git").exists():
        return []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


FILES = repository_files()
TEXTS = [name for name in FILES if Path(name).suffix not in BINARY]
every_text = pytest.mark.parametrize("name", TEXTS)


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_large(name):
    size = (ROOT / name).stat().st_size
    assert size <= LARGE_FILES.get(name, SIZE_LIMIT), f"{name} has {size:,} bytes"


@every_text
def test_files_end_with_one_newline(name):
    text = text_of(name)
    assert text == "" or text == text.rstrip("\n") + "\n", f"{name} must end with one newline"
    assert "\r" not in text, f"{name} has carriage returns"


@every_text
def test_no_file_names_a_machine(name):
    paths = re.findall(r"(?<![\w.$}])/(?:work|farm|root|opt|Users|home)/[\w.-]*", text_of(name))
    assert not paths, f"{name} holds paths of one machine: {paths}"


@every_text
def test_links_lead_to_known_places(name):
    hosts = set(re.findall(r"https?://([\w.-]+)", text_of(name)))
    assert hosts <= KNOWN_HOSTS, f"{name} links to {sorted(hosts - KNOWN_HOSTS)}"


@every_text
def test_nothing_is_left_unfinished(name):
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK", "NotImplemented" + "Error"])
    found = re.findall(rf"\b(?:{marks})\b", text_of(name))
    assert not found, f"{name} holds {found}"
    conflicts = re.findall(r"^(?:<{7}|>{7}|={7}$)", text_of(name), flags=re.MULTILINE)
    assert not conflicts, f"{name} holds the marks of a merge"


def test_the_changelog_has_this_version():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    changelog = text_of("CHANGELOG.md")
    assert f"## [{project['version']}]" in changelog
    assert "## [Unreleased]" in changelog


def test_the_citation_has_this_version():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert f"\nversion: {project['version']}\n" in text_of("CITATION.cff")


def pins() -> dict[str, str]:
    lines = [line for line in text_of("constraints.txt").splitlines() if line[:1].isalnum()]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_asked_for_is_pinned():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    asked = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked += extra
    for requirement in asked:
        name = normal(re.match(r"[\w.-]+", requirement)[0])
        assert name in pins(), f"{requirement} has no line in constraints.txt"


def test_the_pins_are_one_consistent_set():
    """The environment that runs this must be the pinned one, or the pins are a fiction."""
    from importlib.metadata import PackageNotFoundError, version

    for name, pinned in pins().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is pinned and not installed: run `make setup`")
        assert installed.split("+")[0] == pinned, f"{name}: {installed} installed, {pinned} pinned"


def test_long_lists_of_checks_cannot_be_empty():
    assert not (ROOT / ".git").exists() or len(FILES) > 50
