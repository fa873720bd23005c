"""The embedded model: small, well-formed, and better than what it is compared with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import jamba_lm
from benchmarks.byte_trigram import ByteTrigram
from benchmarks.embedded_model import SAMPLE, TRIGRAMS, compare, xz_bits
from jamba_lm.config import JambaConfig
from jamba_lm.errors import DataError
from jamba_lm.model.layout import draw_layers
from jamba_lm.presets import preset
from jamba_lm.sampling import Sampling
from jamba_lm.text.documents import read_documents
from jamba_lm.training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = jamba_lm.embedded_model_path()
# A sample of about 30 kB: enough to tell 1.5 bits from 2.8, and a few seconds of work.
SHORT_SAMPLE_DOCUMENTS = 9


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return list(read_documents(SAMPLE))


@pytest.fixture(scope="module")
def trigram() -> ByteTrigram:
    return ByteTrigram.load(TRIGRAMS)


@pytest.mark.slow
def test_it_beats_xz_and_a_trigram_model_on_held_out_text(held_out, trigram):
    short = held_out[:: len(held_out) // SHORT_SAMPLE_DOCUMENTS]
    found = compare(FOLDER, short, trigram, context_tokens=512)
    # xz has no training text, so it is also given its best case: the whole sample at once.
    xz = xz_bits(held_out) / sum(len(text.encode("utf-8")) for text in held_out)
    assert found["embedded model"] < 0.75 * found["trigram byte model"]
    assert found["embedded model"] < 0.75 * min(xz, found["xz -9e"])


@pytest.mark.slow
def test_what_it_writes_is_made_of_english_words(held_out):
    model, tokenizer = jamba_lm.load(FOLDER), jamba_lm.load_tokenizer(FOLDER)
    known = {word.lower() for text in held_out for word in re.findall(r"[A-Za-z]+", text)}
    words: list[str] = []
    for seed, prompt in enumerate(["The people of the United States", "She was a young woman"]):
        ids = tokenizer.encode(prompt)
        tokens = jamba_lm.generate(
            model, ids, max_new_tokens=120, sampling=Sampling(temperature=0.8, seed=seed)
        )
        text = tokenizer.decode([*ids, *(token.id for token in tokens)])
        words += re.findall(r"[A-Za-z]+", text)
    # The held-out sample has some 6,000 different words; English text at large has about nine in
    # ten of its words among those.
    assert len(words) > 100
    assert sum(word.lower() in known for word in words) > 0.8 * len(words)


def test_it_is_small_and_what_the_recipe_says():
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    config = JambaConfig.load(FOLDER)
    assert config == recipe.model
    assert config == preset("demo").replace(
        aux_loss_coef=config.aux_loss_coef, context_length=config.context_length
    )
    assert draw_layers(config) == "m m* m m* A m* m m*"
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 10**6


def test_it_has_everything_that_a_checkpoint_has():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_its_card_says_what_it_learned_from(held_out):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in (
        "demonstration",
        "bits per byte",
        "tokens",
        "public domain",
        "CC0",
        "jamba train",
    ):
        assert words in card
    manifest = json.loads((ROOT / "recipes" / "demo_manifest.json").read_text())
    for source in (*manifest["packages"], *manifest["more_packages"]):
        assert f"{source['package']} {source['version']}" in card
    for side in ("train", "more", "validation"):
        assert f"{manifest[side]['text_bytes']:,}" in card
        assert manifest[side]["sha256"] in card


def test_a_trigram_model_is_a_distribution_and_knows_what_it_saw():
    model = ByteTrigram.of_texts([b"abracadabra", b"abra"])
    totals = [
        sum(2 ** -model.bits(before + bytes([byte])) for byte in range(256))
        / 2 ** -model.bits(before)
        for before in (b"", b"a", b"ab", b"zz")
    ]
    assert totals == pytest.approx([1.0] * 4)
    assert model.bits(b"abra") < model.bits(b"arba") < model.bits(b"\xff\xfe\xfd\xfc")


def test_a_trigram_model_is_the_formula_by_hand():
    """p(c | a b) for counts that fit on paper: n(aab) = 2, n(aac) = 1 and nothing else."""
    counts = np.zeros((256, 256, 256), dtype=np.int64)
    counts[97, 97, 98], counts[97, 97, 99] = 2, 1
    model = ByteTrigram(counts)
    # The discount once / (once + 2 * twice) is 1 / (1 + 2) for triples. The pairs ab and ac were
    # seen after one byte each, and b and c after one: there it is 2 / (2 + 0), which leaves nothing
    # to the pairs themselves and all to the uniform 1/256 at the bottom.
    discount = 1 / 3
    expected = (2 - discount) / 3 + discount * 2 / 3 * (1 / 256)
    assert 2 ** -(model.bits(b"aab") - model.bits(b"aa")) == pytest.approx(expected)


def test_trigrams_survive_a_file_and_other_files_are_refused(tmp_path):
    model = ByteTrigram.of_texts([b"some text, some text"])
    model.save(tmp_path / "t.safetensors")
    again = ByteTrigram.load(tmp_path / "t.safetensors")
    assert again.bits(b"some other text") == model.bits(b"some other text")
    with pytest.raises(DataError, match="not a table"):
        ByteTrigram.load(FOLDER / "model.safetensors")


def test_the_held_out_sample_is_small_and_of_every_source():
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert SAMPLE.stat().st_size < 300_000
    assert {record["source"] for record in records} == {
        "sotu",
        "shakespeare",
        "kjv",
        "austen",
        "owt",
    }
    assert len({record["text"] for record in records}) == len(records)
