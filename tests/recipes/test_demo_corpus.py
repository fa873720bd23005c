"""The corpus script: texts are split by their own content, and the manifest is of its sources."""

from __future__ import annotations

import json

from tests.recipes.scripts import RECIPES, load_script

corpus = load_script("demo_corpus")


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


def test_the_manifest_is_of_the_sources_in_the_script():
    manifest = json.loads((RECIPES / "demo_manifest.json").read_text())
    for packages, sources in (("packages", corpus.SOURCES), ("more_packages", corpus.MORE)):
        assert [(one["package"], one["version"], one["sha256"]) for one in manifest[packages]] == [
            (source.package, source.version, source.sha256) for source in sources
        ]
