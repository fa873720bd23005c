"""Every parameter of every arm has one public name, and old spellings lead to it."""

from __future__ import annotations

import pytest
import torch

from jamba_lm.checkpoint.rename import Source, find_sources, public_name
from jamba_lm.model.decoder import Decoder
from tests.arms import ARMS


@pytest.mark.parametrize("arm", ARMS)
def test_public_names_are_one_to_one(arm: str):
    with torch.device("meta"):
        own = [name for name, _ in Decoder(ARMS[arm]).named_parameters()]
    assert len({public_name(name) for name in own}) == len(own)


def test_the_norms_of_B_and_C_keep_their_names():  # noqa: N802
    # Their gains only ever meet as a product, so that no forward pass could tell them apart.
    names = [public_name(f"blocks.0.mixer.{one}_norm.weight") for one in ("B", "C")]
    assert names == [f"model.layers.0.mamba.{one}_layernorm.weight" for one in ("b", "c")]


def test_a_parameter_outside_the_table_is_our_mistake():
    with pytest.raises(KeyError, match=r"mixer\.secret"):
        public_name("blocks.0.mixer.secret")


@pytest.mark.parametrize(
    ("stored", "public"),
    [
        ("model.layers.3.moe.router.weight", "model.layers.3.feed_forward.router.weight"),
        ("model.layers.3.pre_moe_layernorm.weight", "model.layers.3.pre_ff_layernorm.weight"),
        ("model.layers.3.mamba.B_layernorm.weight", "model.layers.3.mamba.b_layernorm.weight"),
        ("model.layers.3.mamba.C_layernorm.weight", "model.layers.3.mamba.c_layernorm.weight"),
        (
            "model.layers.3.moe.experts.0.up_proj.weight",
            "model.layers.3.feed_forward.up_proj.weight",
        ),
        ("model.layers.3.mamba.A_log", "model.layers.3.mamba.A_log"),
    ],
)
def test_old_spellings_lead_to_the_public_name(stored: str, public: str):
    assert find_sources({stored: (4, 4)}, num_experts=4) == {public: [Source(stored)]}


def test_the_first_of_many_experts_is_not_a_dense_layer():
    names = [f"model.layers.3.moe.experts.{e}.up_proj.weight" for e in range(2)]
    found = find_sources(dict.fromkeys(names, (4, 4)), num_experts=2)
    assert list(found) == [n.replace(".moe.", ".feed_forward.") for n in names]


def test_a_stack_of_another_number_of_experts_keeps_its_name():
    # Taking apart what the header claims could cost memory without bound.
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    assert find_sources({name: (10**9, 8, 4)}, num_experts=4) == {name: [Source(name)]}


def test_gate_comes_before_up_in_a_stack():
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    found = find_sources({name: (2, 6, 4)}, num_experts=2)
    gate = "model.layers.1.feed_forward.experts.1.gate_proj.weight"
    assert found[gate] == [Source(name, 1, (0, 3))]
    assert found[gate.replace("gate", "up")] == [Source(name, 1, (3, 6))]
