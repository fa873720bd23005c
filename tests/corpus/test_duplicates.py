"""Copies are found, exactly and nearly; what only resembles stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupFilter
from datatrove.utils.hashing import HashConfig
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.corpus.datatrove_filters import _splitter
from jamba_lm.corpus.duplicates import exact_copies, near_copies, sort_keys
from jamba_lm.corpus.minhash import MinHash
from jamba_lm.corpus.recipe import DuplicatesSection
from jamba_lm.corpus.shingles import shingles, word_numbers
from tests.corpus.corpora import prepared, sentence_text, stage_of, write_jsonl
from tests.tolerances import MINHASH_DEVIATIONS

OPTIONS = DuplicatesSection()


def edited(text: str, share: float, seed: int) -> str:
    """Replace that share of the words."""
    draw = random.Random(seed)
    words = text.split(" ")
    for place in draw.sample(range(len(words)), int(share * len(words))):
        words[place] = f"word{draw.randrange(10**6)}"
    return " ".join(words)


def jaccard(one: str, other: str) -> float:
    a, b = (set(shingles(word_numbers(text), OPTIONS.ngram).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.02, 0.05, 0.2, 0.6])
def test_signatures_agree_as_often_as_the_texts_overlap(share):
    minhash = MinHash(DuplicatesSection(bands=64, rows=16))
    one = sentence_text(1, 800)
    other = edited(one, share, seed=2)
    true = jaccard(one, other)
    estimated = (minhash.signature(one) == minhash.signature(other)).mean()
    deviation = np.sqrt(true * (1 - true) / minhash.size)
    assert abs(estimated - true) <= MINHASH_DEVIATIONS * deviation


def groups_of(texts: list[str]) -> list[int]:
    minhash = MinHash(OPTIONS)
    signatures = np.stack([minhash.signature(text) for text in texts])
    return near_copies(signatures, np.ones(len(texts), bool), OPTIONS).tolist()


def test_near_copies_are_found_and_resembling_texts_are_not():
    originals = [sentence_text(number, 400) for number in range(20)]
    copies = [edited(text, 0.01, seed) for seed, text in enumerate(originals[:10])]
    cousins = [edited(text, 0.3, seed) for seed, text in enumerate(originals[10:])]
    found = groups_of([*originals, *copies, *cousins])
    assert found == [*range(20), *range(10), *range(30, 40)]


def test_case_punctuation_and_spacing_do_not_make_a_text_another():
    text = sentence_text(3, 200)
    assert groups_of([text, text.upper().replace(".", " !").replace(" ", "  ")]) == [0, 0]


def test_copies_of_copies_are_one_group_whatever_their_order():
    chain = [sentence_text(7, 600)]
    for seed in range(6):
        chain.append(edited(chain[-1], 0.012, seed))
    texts = [*chain, *(sentence_text(number, 300) for number in range(20, 30))]
    draw = random.Random(0)
    for _ in range(3):
        order = list(range(len(texts)))
        draw.shuffle(order)
        found = groups_of([texts[place] for place in order])
        names = {order[place]: order[first] for place, first in enumerate(found)}
        assert len({names[place] for place in range(len(chain))}) == 1
        assert len({names[place] for place in range(len(chain), len(texts))}) == 10
        # The first in order stands for its group.
        assert min(place for place, one in enumerate(order) if one < len(chain)) in found


def test_texts_too_short_for_a_sequence_are_no_copies_of_each_other():
    assert groups_of(["one two", "three four", "", "one two three four"]) == [0, 1, 2, 3]


def test_what_is_dropped_already_takes_no_part():
    minhash = MinHash(OPTIONS)
    texts = [sentence_text(1, 200), sentence_text(1, 200), sentence_text(1, 200)]
    signatures = np.stack([minhash.signature(text) for text in texts])
    alive = np.array([False, True, True])
    assert near_copies(signatures, alive, OPTIONS).tolist() == [0, 1, 1]


@given(st.lists(st.integers(0, 5), max_size=30))
def test_exact_copies_point_to_the_first_of_their_kind(kinds):
    table = np.random.default_rng(0).integers(0, 256, (6, 16), np.uint8)
    # Two of the hashes differ in their last byte only.
    table[1] = table[0]
    table[1, 15] ^= 1
    hashes = table[kinds] if kinds else np.empty((0, 16), np.uint8)
    assert exact_copies(hashes).tolist() == [kinds.index(kind) for kind in kinds]


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20))
def test_hashes_sort_as_their_bytes_do(hashes):
    array = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
    high, low = sort_keys(array)
    assert [hashes[place] for place in np.lexsort((low, high))] == sorted(hashes)


def datatroves_survivors(texts: list[str], folder: Path) -> list[int]:
    """Run the four steps of datatrove's MinHash and return which documents it keeps."""
    config = MinhashConfig(
        n_grams=OPTIONS.ngram,
        num_buckets=OPTIONS.bands,
        hashes_per_bucket=OPTIONS.rows,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )

    def documents():
        for number, text in enumerate(texts):
            yield Document(text=text, id=str(number))

    signatures, buckets, removed = (str(folder / name) for name in ("sig", "buckets", "removed"))
    MinhashDedupSignature(signatures, config, language=_splitter()).run(documents())
    for bucket in range(OPTIONS.bands):
        step = MinhashDedupBuckets(signatures, buckets, config=config)
        step.run(None, rank=bucket, world_size=OPTIONS.bands)
    MinhashDedupCluster(buckets, removed, config=config).run(None)
    return [int(document.id) for document in MinhashDedupFilter(removed).run(documents())]


def test_datatrove_finds_the_same_copies(tmp_path):
    """The same dials on the same texts; none is so much like another that luck would count."""
    originals = [sentence_text(number, 500) for number in range(12)]
    copies = [edited(text, 0.004, seed) for seed, text in enumerate(originals[:8])]
    texts = [*originals, *copies]
    ours = [place for place, first in enumerate(groups_of(texts)) if place == first]
    theirs = datatroves_survivors(texts, tmp_path)
    # Which one of a group stays is another matter: they keep another than the first.
    assert len(theirs) == len(ours) == 12
    pairs = [{place, place + 12} for place in range(8)]
    assert all(len(pair & set(theirs)) == 1 for pair in pairs)


def test_the_source_that_stands_first_in_the_recipe_keeps_its_copy(tmp_path):
    text = sentence_text(5, 300)
    write_jsonl(tmp_path / "web.jsonl", [*map(sentence_text, range(20, 24)), text, text])
    write_jsonl(
        tmp_path / "books.jsonl", [edited(text, 0.01, 1), *map(sentence_text, range(30, 34))]
    )
    sources = [{"name": name, "files": [f"{name}.jsonl"]} for name in ("web", "books")]
    one = prepared(tmp_path, "one", source=sources)
    assert stage_of(one, "web", "exact duplicates")["dropped"] == {"within the source": 1}
    assert stage_of(one, "books", "near duplicates")["dropped"] == {"in web": 1}
    (sample,) = stage_of(one, "books", "near duplicates")["samples"]["in web"]
    assert (sample["place"], sample["kept"]["place"]) == (
        "books.jsonl, document 1",
        "web.jsonl, document 5",
    )
    other = prepared(tmp_path, "other", source=sources[::-1])
    assert stage_of(other, "web", "near duplicates")["dropped"] == {"in books": 1}
    kept = prepared(tmp_path, "kept", source=sources, duplicates={"exact": False, "near": False})
    assert (
        sum(s.train[0].documents + sum(e.documents for e in s.validation) for s in kept.sources)
        == 11
    )
