"""What a call must do at least: held against the tensors, the definition and the paper's sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.memory import (
    kv_cache_bytes,
    mamba_state_bytes,
    parameter_counts,
    weight_bytes,
)
from jamba_lm.analysis.roofline import (
    Call,
    Speeds,
    Work,
    experts_touched,
    floor_seconds,
    layer_work,
    model_work,
)
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers
from jamba_lm.presets import PRESETS, preset
from tests.config_strategies import configs

SPEEDS = Speeds(
    threads=2, read_bytes=4e10, amounts={"fp32": 2e11, "bf16": 8e11, "int8": 16e11, "scan": 1e10}
)
STEP = Call(sequences=1, tokens=1, past=0)


def total(works: list[Work], what: str) -> float:
    return sum(getattr(work, what) for work in works)


PRODUCTS = {"Mamba projections", "attention projections", "MLP", "router", "experts", "head"}


@pytest.mark.parametrize("name", ["tiny", "mid", "3b", "jamba-v0.1"])
def test_a_decode_step_multiplies_by_every_active_weight_and_reads_it_once(name: str):
    config = preset(name)
    counts = parameter_counts(config)
    works = [work for work in model_work(config, STEP, "bf16") if work.part in PRODUCTS]
    # The embedding gives one row; norms, convolution and decays are no products.
    embedding = 0 if config.tie_embeddings else counts.active_by_part["embedding"]
    assert total(works, "amount") / 2 == pytest.approx(counts.active - embedding, rel=0.01)
    assert total(works, "num_bytes") / 2 == pytest.approx(counts.active - embedding, rel=0.01)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_a_long_prompt_reads_every_weight_once_and_moves_the_states(weights: str):
    config = preset("3b")  # its head is the embedding, so no weight is left out
    read = total(model_work(config, Call(1, 2048, 0), weights), "num_bytes")
    states = 2 * mamba_state_bytes(config) + kv_cache_bytes(config, tokens=2048)
    assert read == pytest.approx(weight_bytes(config, weights) + states, rel=0.01)


def test_packed_matrices_are_held_against_the_product_of_their_type():
    works = model_work(preset("3b"), Call(1, 512, 0), "int8")
    assert {work.unit for work in works if work.part == "MLP"} == {"int8"}
    assert {work.unit for work in works if work.part == "attention"} == {"bf16"}


@given(configs(), st.integers(1, 4), st.integers(1, 40), st.integers(0, 100))
def test_the_work_of_a_model_is_that_of_its_layers_and_of_its_head(
    config: JambaConfig, sequences: int, tokens: int, past: int
):
    call = Call(sequences, tokens, past)
    whole = model_work(config, call, "bf16")
    layers = [
        work for spec in plan_layers(config) for work in layer_work(config, spec, call, "bf16")
    ]
    heads = [work for work in whole if work.part == "head"]
    for what in ("num_bytes", "amount"):
        assert total(whole, what) == pytest.approx(total(layers, what) + total(heads, what))
    assert min(total(whole, "num_bytes"), total(whole, "amount")) > 0


@given(st.integers(0, 300), st.integers(1, 8))
def test_attention_looks_at_as_many_pairs_however_the_prompt_is_cut(past: int, tokens: int):
    config = preset("tiny")

    def amount(*calls: Call) -> float:
        return sum(
            work.amount
            for call in calls
            for work in model_work(config, call, "bf16")
            if work.part == "attention"
        )

    pieces = [Call(1, 1, past + index) for index in range(tokens)]
    assert amount(Call(1, tokens, past)) == pytest.approx(amount(*pieces))


def test_experts_are_touched_two_by_one_token_and_all_by_many():
    config = JambaConfig()
    assert experts_touched(config, 1) == config.experts_per_token
    assert experts_touched(config, 10_000) == pytest.approx(config.num_experts)


def test_a_step_is_limited_by_memory_and_a_prompt_by_arithmetic():
    config = preset("3b")
    step, prompt = model_work(config, STEP, "bf16"), model_work(config, Call(1, 512, 0), "bf16")
    for works, memory in ((step, True), (prompt, False)):
        (mlp,) = (work for work in works if work.part == "MLP")
        assert mlp.reads_longer(SPEEDS) is memory
    assert floor_seconds(step, SPEEDS) == pytest.approx(6.06e9 / 4e10, rel=0.01)
    assert floor_seconds(prompt, SPEEDS) == pytest.approx(512 * 6.06e9 / 8e11, rel=0.15)


@given(st.floats(1e9, 1e12), st.floats(1e9, 1e13))
def test_a_floor_is_the_longer_of_the_two(read_bytes: float, amount: float):
    speeds = Speeds(1, read_bytes, {"fp32": amount, "bf16": amount, "int8": amount, "scan": amount})
    work = Work("MLP", 3e9, 5e11, "bf16", "MLP")
    assert work.floor(speeds) == max(3e9 / read_bytes, 5e11 / amount)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_roofline(name: str):
    assert floor_seconds(model_work(preset(name), STEP, "int4"), SPEEDS) > 0
