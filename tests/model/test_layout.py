"""The layer pattern is the paper's, and transformers' own."""

from __future__ import annotations

import transformers
from hypothesis import given

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import write_patterns
from jamba_lm.model.layout import draw_layers, plan_layers
from jamba_lm.presets import PRESETS
from tests.config_strategies import configs


def attention_layers(config):
    return [layer.index for layer in plan_layers(config) if layer.mixer == "attention"]


def expert_layers(config):
    return [layer.index for layer in plan_layers(config) if layer.feed_forward == "moe"]


def test_the_released_model_is_the_paper_s_block_four_times():
    block = "m m* m m* A m* m m*"
    assert draw_layers(JambaConfig()) == " ".join([block] * 4)


def test_expert_layers_follow_the_offset_and_not_its_negative():
    """Only for (2, 1) and the like do `i - offset` and `i + offset` agree; one peer adds."""
    config = JambaConfig(num_layers=9, expert_period=3, expert_offset=1)
    assert expert_layers(config) == [1, 4, 7]


def test_one_expert_is_a_plain_mlp():
    assert expert_layers(PRESETS["jamba-reasoning-3b"]) == []
    assert attention_layers(PRESETS["jamba-reasoning-3b"]) == [7, 21]


def test_only_attention_and_only_mamba_are_patterns():
    only_attention = JambaConfig(num_layers=5, attention_period=1, attention_offset=0)
    only_mamba = JambaConfig(num_layers=5, attention_period=6, attention_offset=5)
    assert attention_layers(only_attention) == [0, 1, 2, 3, 4]
    assert attention_layers(only_mamba) == []


@given(configs(public=True))
def test_the_pattern_is_that_of_transformers(config):
    oracle = transformers.JambaConfig(**config.to_hf())
    plan = plan_layers(config)
    assert [layer.index for layer in plan] == list(range(config.num_layers))
    assert [layer.mixer for layer in plan] == oracle.layers_block_type
    experts = [config.num_experts if layer.feed_forward == "moe" else 1 for layer in plan]
    assert experts == oracle.layers_num_experts


@given(configs())
def test_the_pattern_is_the_one_that_config_json_is_held_to(config):
    written = write_patterns(config.to_dict())
    assert written["layers_block_type"] == [layer.mixer for layer in plan_layers(config)]


@given(configs())
def test_the_drawing_shows_every_layer(config):
    signs = draw_layers(config).split(" ")
    for sign, layer in zip(signs, plan_layers(config), strict=True):
        assert sign[0] == {"attention": "A", "mamba": "m"}[layer.mixer]
        assert sign[1:] == {"moe": "*", "mlp": ""}[layer.feed_forward]
