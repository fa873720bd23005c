"""Checkpoints mean the same here and in transformers, in both directions and whatever the shape."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import JambaForCausalLM

from jamba_lm.config import JambaConfig
from jamba_lm.kernels.ops import BACKENDS
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.model.layout import plan_layers
from tests.aligned import aligned
from tests.checkpoint.oracle import (
    DIALS,
    GRID,
    STEPS,
    complaints,
    config_values,
    some_ids,
    their_logits,
    their_model,
)
from tests.tolerances import ORACLE, assert_within

NAMES = list(GRID)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """Their checkpoint of each entry of the grid, and their answers: made once for all tests."""

    @cache
    def write(name: str) -> tuple[Path, list[int], int, torch.Tensor]:
        folder = tmp_path_factory.mktemp("theirs")
        model = their_model(config_values(GRID[name]), seed=NAMES.index(name))
        model.save_pretrained(folder)
        prompt = GRID[name]["prompt tokens"]
        ids = some_ids(prompt + STEPS, seed=NAMES.index(name))
        return folder, ids, prompt, their_logits(model, ids, prompt)

    return write


@pytest.fixture(scope="module")
def rewritten(written, tmp_path_factory: pytest.TempPathFactory):
    """Our checkpoint of each entry of the grid, of the weights that were read from theirs."""

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("ours")
        load(written(name)[0]).save(folder)
        return folder

    return write


def our_logits(model: LanguageModel, ids: list[int], prompt: int) -> torch.Tensor:
    state = model.new_state()
    pieces = [ids[:prompt], *([one] for one in ids[prompt:])]
    return torch.cat([model.logits([piece], [state])[0] for piece in pieces])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_writes_gives_the_same_logits_here(written, name: str, backend: str):
    folder, ids, prompt, expected = written(name)
    model = load(folder, backend=backend)
    found = our_logits(model, ids, prompt)
    assert_within(found, expected, ORACLE["fp32"], name)


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_gives_the_same_logits_in_transformers(written, rewritten, name: str):
    _, ids, prompt, expected = written(name)
    with complaints() as heard:
        theirs, report = JambaForCausalLM.from_pretrained(rewritten(name), output_loading_info=True)
    assert heard == []
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert torch.equal(their_logits(aligned(theirs), ids, prompt), expected)


@pytest.mark.parametrize("name", NAMES)
def test_our_files_are_laid_out_as_theirs(written, rewritten, name: str):
    folder, *_ = written(name)
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(rewritten(name) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert JambaConfig.load(rewritten(name)) == JambaConfig.load(folder)


def test_a_tensor_too_many_is_heard_of():
    # The listener of the tests above hears what it listens for.
    model = their_model(config_values(GRID["only attention"]), seed=0)
    values = model.state_dict() | {"model.layers.0.self_attn.extra": torch.ones(2)}
    with complaints() as heard:
        JambaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=values, output_loading_info=True
        )
    assert any("extra" in message for message in heard)


# What the grid as a whole must show, beside every value of every dial. "Shown" is counted where
# it has an effect: experts need an expert layer, and a convolution needs a Mamba layer.


def shown_by(dials: dict[str, Any]) -> set[tuple[str, Any]]:
    config = JambaConfig.from_hf({"model_type": "jamba", **config_values(dials)})
    mixers = {layer.mixer for layer in plan_layers(config)}
    sparse = any(layer.feed_forward == "moe" for layer in plan_layers(config))
    needs_attention = {"heads, groups, width"}
    needs_experts = {"num_experts_per_tok", "expert period, offset"}
    shown: set[tuple[str, Any]] = set()
    for name, value in dials.items():
        if (
            (name.startswith("mamba_") and "mamba" not in mixers)
            or (name in needs_attention and "attention" not in mixers)
            or (name in needs_experts and not sparse)
            or (name == "num_experts" and value > 1 and not sparse)
            or (name == "attention period, offset" and len(mixers) == 1 and value != (1, 0))
        ):
            continue
        shown.add((name, value))
    shown.add(("mixers", tuple(sorted(mixers))))
    return shown


def test_the_grid_shows_every_value_of_every_dial():
    assert len(GRID) >= 24
    shown = set().union(*map(shown_by, GRID.values()))
    wanted = {(name, value) for name, values in DIALS.items() for value in values}
    wanted |= {
        ("mixers", mixers) for mixers in [("attention",), ("mamba",), ("attention", "mamba")]
    }
    wanted |= {("attention period, offset", (14, 7))}
    assert wanted - shown == set()


@pytest.mark.parametrize("name", ["as Jamba v0.1", "drawn 1"])
def test_no_weight_of_the_grid_is_invisible(name: str):
    # A parameter that hardly changes the logits would hide a mistake in how it is read.
    model = their_model(config_values(GRID[name]), seed=NAMES.index(name))
    ids = some_ids(8)
    expected = their_logits(model, ids, len(ids))
    scale = float(expected.abs().max())
    hidden = []
    for key, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.05 + 0.1 * torch.rand(parameter.shape))
        change = float((their_logits(model, ids, len(ids)) - expected).abs().max()) / scale
        if change < 10 * ORACLE["fp32"]:
            hidden.append((key, change))
        with torch.no_grad():
            parameter.copy_(kept)
    assert hidden == []
