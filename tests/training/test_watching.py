"""What is logged of the inside of a model is what is there, and curves are drawn of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from jamba_lm.errors import InputError
from jamba_lm.model.batch import Batch
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.presets import preset
from jamba_lm.training import curves, loop
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.utilization import product_weights, training_flops
from jamba_lm.training.watching import watched
from tests.training.test_optimizer import tiny_decoder
from tests.training.tiny_run import log_of, write_tiny_run


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def watched_run(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "watched"
    changes = ["watch.every_steps=4", "watch.tensorboard=true"]
    loop.train(load_recipe(recipe_path, changes), folder, peak_flops=1e9)
    return folder


def test_maxima_are_those_of_the_places_they_name():
    decoder = tiny_decoder()
    ids_M = torch.arange(12) % decoder.config.vocab_size
    with watched(decoder) as maxima:
        expected = decoder(ids_M, Batch.of([12]), hidden=True)
    assert torch.equal(decoder(ids_M, Batch.of([12]), hidden=True), expected)
    assert sorted(maxima) == sorted(f"blocks.{n}" for n in range(len(decoder.blocks)))
    first = decoder.blocks[0]
    assert isinstance(first.mixer, MambaMixer)
    batch, x_MD = Batch.of([12]), decoder.embedding(ids_M)
    inner = first.mixer.in_proj(first.mixer_norm(x_MD, batch))
    assert maxima["blocks.0"]["in_proj"] == pytest.approx(inner.abs().max().item())
    after = first(x_MD, batch, None).abs().max().item()
    assert maxima["blocks.0"]["residual"] == pytest.approx(after)
    for number, block in enumerate(decoder.blocks):
        places = {"mixer", "feed_forward", "residual"}
        if isinstance(block.mixer, MambaMixer):
            places |= {"in_proj", "x_proj", "dt_proj", "gated"}
        assert set(maxima[f"blocks.{number}"]) == places


def test_watching_changes_no_bit_and_is_logged_when_due(watched_run, recipe_path, tmp_path):
    plain = tmp_path / "plain"
    loop.train(load_recipe(recipe_path, ["watch.every_steps=0"]), plain)
    weights = [folder / "model" / "model.safetensors" for folder in (plain, watched_run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found = [one for one in log_of(watched_run) if one["event"] == "watch"]
    assert [one["step"] for one in found] == [4, 8, 12]
    for record in found:
        for shares in record["router_load"].values():
            assert len(shares) == 4
            assert sum(shares) == pytest.approx(1.0)
        assert set(record["gradient_norms"]) >= {"embedding", "blocks.0", "final_norm"}
    steps = {one["step"]: one for one in log_of(watched_run) if one["event"] == "step"}
    norms = found[-1]["gradient_norms"].values()
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(steps[12]["gradient_norm"])


def test_speed_and_the_share_of_the_peak_are_logged(watched_run, recipe_path):
    lines = (watched_run / "log.jsonl").read_text().splitlines()
    record = next(one for one in map(json.loads, lines) if one["event"] == "step")
    assert record["tokens_per_second"] == pytest.approx(96 / record["seconds"], rel=0.02)
    flops = training_flops(load_recipe(recipe_path).model, 96)
    assert record["mfu"] == pytest.approx(flops / record["seconds"] / 1e9, rel=0.02, abs=1e-4)


def test_the_products_of_known_shapes_are_counted():
    # Embedding rows, norms, convolutions, decays and biases are no products.
    assert product_weights(preset("mid")) == 182_190_080
    assert training_flops(preset("tiny"), 1000) == 6 * 12_095_488 * 1000


def test_tensorboard_gets_the_numbers_of_the_log(watched_run):
    (path,) = (watched_run / "tensorboard").iterdir()
    data = path.read_bytes()
    # Records of length, its checksum, an event and its checksum.
    (length,) = struct.unpack_from("<Q", data)
    assert b"brain.Event" in data[12 : 12 + length]
    for name in (b"step/loss", b"validation/bits_per_byte", b"watch/router_load/blocks.1/3"):
        assert name in data, name


def test_curves_of_runs_are_drawn_and_summed_up(watched_run, tmp_path):
    run = curves.read_run(watched_run)
    assert [one["step"] for one in run.steps] == list(range(1, 13))
    told = curves.summary(run)
    assert told["steps"] == 12
    assert told["bits_per_byte"] == run.validations[-1]["bits_per_byte"]
    curves.draw([run, run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write the picture"):
        curves.draw([run], tmp_path / "curves.unknown")


def test_steps_taken_again_count_once(tmp_path):
    def record(event, step, **more):
        return json.dumps({"event": event, "step": step, **more})

    lines = [record("step", n, tokens_seen=10 * n, loss=9.0 - n) for n in (1, 2, 3)]
    lines += [record("rolled back", 3, to_step=1)]
    lines += [record("step", 2, tokens_seen=40, loss=1.0), '{"event": "st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run = curves.read_run(tmp_path)
    assert [(one["step"], one["tokens_seen"]) for one in run.steps] == [(1, 10), (2, 40)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no log of a run"),
        ("\n{}\n", "line 1 of .* is not a record"),
        ("", "holds no step yet"),
        ("[]\n[]", "line 1 of .* is not a record"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        curves.read_run(tmp_path)


def test_smoothing_keeps_a_constant_and_has_no_bias():
    assert curves.smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert curves.smoothed([1.0])[0] == pytest.approx(1.0)
