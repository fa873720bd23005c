"""A configuration is exact, strict, and means the same to transformers, or is refused by it."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import FrozenInstanceError, fields
from typing import get_type_hints

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jamba_lm import config as config_module
from jamba_lm.config import JambaConfig
from jamba_lm.config_json import (
    ALIASES,
    FIELDS,
    NO_EFFECT,
    ONLY,
    OWN_FIELDS,
    ignored,
    read_fields,
)
from jamba_lm.errors import ConfigError
from tests.config_strategies import config_files, configs, json_values, spoiled_content

PUBLIC = JambaConfig(d_model=64, d_ff=32, num_layers=5, num_heads=4, num_kv_heads=2, vocab_size=600)
V01_EARLY = {
    # The first release, when the model was a file of Python code beside its weights.
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"},
    "bos_token_id": 1,
    "calc_logits_for_entire_prompt": False,
    "eos_token_id": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "model_type": "jamba",
    "n_ctx": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}


def test_the_early_file_of_the_released_model_is_the_default():
    assert JambaConfig.from_hf(V01_EARLY) == JambaConfig()


def test_a_config_cannot_be_changed_and_can_be_a_key():
    with pytest.raises(FrozenInstanceError):
        JambaConfig().d_ff = 1
    assert len({JambaConfig(), JambaConfig(), JambaConfig(d_ff=1)}) == 2


def test_every_field_can_be_said_in_config_json():
    names = {field.name for field in fields(JambaConfig)}
    assert set(FIELDS.values()) | set(OWN_FIELDS.values()) == names


def test_every_field_is_checked():
    """A value of a type that no field has is refused everywhere."""
    for field in fields(JambaConfig):
        with pytest.raises(ConfigError, match=field.name):
            JambaConfig(**{field.name: {"surprise": 1}})


def test_left_out_widths_are_integers_after_construction():
    assert (JambaConfig().d_head, JambaConfig().dt_rank) == (128, 256)
    assert JambaConfig(d_model=100, num_heads=3, num_kv_heads=3).dt_rank == 7
    hints = get_type_hints(JambaConfig)
    assert hints["d_head"] is int
    assert hints["dt_rank"] is int


def test_replace_lets_derived_widths_follow_and_keeps_chosen_ones():
    narrow = JambaConfig().replace(d_model=1024, num_heads=16, num_kv_heads=4)
    assert (narrow.d_head, narrow.dt_rank) == (64, 64)
    chosen = JambaConfig(d_head=96, dt_rank=8).replace(d_model=1024)
    assert (chosen.d_head, chosen.dt_rank) == (96, 8)
    assert JambaConfig().replace(d_model=1024, dt_rank=256).dt_rank == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, r"d_model=0 \(hidden_size in config.json\), expected a whole number"),
        ({"d_model": 4096.0}, "expected a whole number"),
        ({"d_model": "4096"}, "expected a whole number"),
        ({"num_layers": True}, "expected a whole number"),
        ({"num_layers": 10**9}, "from 1 to 10000"),
        ({"vocab_size": 10**5000}, "an integer of 16610 bits"),
        ({"conv_bias": 1}, "expected true or false"),
        ({"norm_eps": 0}, "expected a number"),
        ({"norm_eps": float("nan")}, "expected a number"),
        ({"aux_loss_coef": float("inf")}, "expected a number"),
        ({"attention_offset": 8}, r"attention_offset=8 .*expected 0 to 7"),
        ({"expert_offset": 2}, "expected 0 to 1"),
        ({"num_kv_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        ({"experts_per_token": 17}, "at most num_experts=16"),
        ({"num_heads": 8192, "num_kv_heads": 1}, "d_head=0"),
        ({"position": "alibi"}, "expected 'none' or 'rope'"),
        ({"position": "rope", "d_head": 3}, "expected an even number"),
        ({"rope_theta": 5e5}, "without position='rope' would have no effect"),
        ({"pad_id": 65536}, "from 0 to 65535"),
        ({"eos_ids": (2, -1)}, "eos_ids=-1"),
        ({"eos_ids": 2}, "expected a list of token ids"),
        ({"eos_ids": tuple(range(2000))}, "expected at most 1024"),
    ],
)
def test_an_impossible_value_is_named_with_what_was_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        JambaConfig(**changes)


def test_an_unknown_name_of_ours_is_told_its_neighbour():
    for wrong in (JambaConfig.from_dict, lambda values: JambaConfig().replace(**values)):
        with pytest.raises(ConfigError, match="'num_head'; did you mean 'num_heads'"):
            wrong({"num_head": 3})


@given(configs())
def test_our_own_names_survive_a_round_trip(config):
    assert JambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs())
def test_config_json_survives_a_round_trip(config):
    assert JambaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_a_config_is_saved_and_loaded_from_folder_or_file(tmp_path):
    config = PUBLIC.replace(eos_ids=(2, 518))
    config.save(tmp_path / "new" / "folder")
    assert JambaConfig.load(tmp_path / "new" / "folder") == config
    assert JambaConfig.load(tmp_path / "new" / "folder" / "config.json") == config


def test_a_public_file_holds_what_transformers_needs_and_nothing_only_we_read():
    content = PUBLIC.to_hf()
    assert content["model_type"] == "jamba"
    assert content["architectures"] == ["JambaForCausalLM"]
    # Readers before transformers 5 do not know head_dim; they derive it.
    assert not {"head_dim", "mamba_inner_layernorms", *OWN_FIELDS} & set(content)
    assert PUBLIC.replace(d_head=7).to_hf()["head_dim"] == 7


def test_a_folder_without_config_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^no model configuration at .*config\.json"):
        JambaConfig.load(tmp_path)


# --- config.json key by key


def test_the_four_groups_of_keys_are_disjoint_and_give_reasons():
    groups = [set(FIELDS), set(ALIASES), set(NO_EFFECT), set(ONLY) - set(OWN_FIELDS)]
    assert len(set().union(*groups)) == sum(map(len, groups))
    assert all(len(reason) > 15 for reason in NO_EFFECT.values())
    assert all(len(reason) > 15 for _, reason in ONLY.values())


@pytest.mark.parametrize("key", NO_EFFECT)
def test_a_key_without_effect_is_accepted_with_any_value(key):
    for value in (None, True, 17, "text", [1], {"a": 1}):
        content = PUBLIC.to_hf() | {key: value}
        assert JambaConfig.from_hf(content) == PUBLIC
        assert ignored(content)[key] == NO_EFFECT[key]


@pytest.mark.parametrize("key", ONLY)
def test_a_key_that_could_change_results_is_accepted_with_neutral_values_only(key):
    allowed, reason = ONLY[key]
    for value in allowed:
        assert JambaConfig.from_hf(PUBLIC.to_hf() | {key: value}) == PUBLIC
    for value in (0.1, 4096, "gelu", ["x"], {"rope_type": "yarn"}):
        with pytest.raises(ConfigError) as refused:
            JambaConfig.from_hf(PUBLIC.to_hf() | {key: value})
        assert f"{key}=" in str(refused.value)
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("key", "neighbour"),
    [
        ("mamba_d_stat", "mamba_d_state"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("attn_period", "attn_layer_period"),
        ("rms_eps", "rms_norm_eps"),
    ],
)
def test_an_unknown_key_names_the_closest_known_one(key, neighbour):
    with pytest.raises(ConfigError, match=f"'{key}' in config.json; did you mean '{neighbour}'"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {key: 1})


def test_an_unknown_key_without_neighbour_says_what_to_do():
    with pytest.raises(ConfigError, match="it might change the model: remove it if it does not"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {"zzzzzzzzzz": 1})


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_its_real_key_and_may_not_contradict_it(alias):
    real = ALIASES[alias]
    content = PUBLIC.to_hf()
    value = content.pop(real)
    assert JambaConfig.from_hf(content | {alias: value}) == PUBLIC
    assert JambaConfig.from_hf(content | {alias: value, real: value}) == PUBLIC
    for order in ((alias, real), (real, alias)):
        with pytest.raises(ConfigError, match=f"gives {real} under two names.*{alias}"):
            JambaConfig.from_hf(content | {order[0]: value, order[1]: value + 1})


@pytest.mark.parametrize("key", ["layers_block_type", "layer_types", "layers_num_experts"])
def test_a_list_of_layers_is_accepted_when_it_says_the_same(key):
    oracle = transformers.JambaConfig(**PUBLIC.to_hf())
    layers = list(getattr(oracle, key))
    assert JambaConfig.from_hf(PUBLIC.to_hf() | {key: layers}) == PUBLIC
    for wrong in (layers[:-1], [*layers[1:], layers[0]], "mamba", [], 3):
        with pytest.raises(ConfigError, match=f"{key}=.*contradicts its layer period and offset"):
            JambaConfig.from_hf(PUBLIC.to_hf() | {key: wrong})


def test_values_that_mean_by_default_are_understood():
    content = PUBLIC.to_hf() | {
        "mamba_dt_rank": "auto",
        "head_dim": None,
        "num_key_value_heads": None,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = JambaConfig.from_hf(content)
    assert (config.dt_rank, config.d_head, config.num_kv_heads) == (4, 16, 4)
    assert (config.pad_id, config.bos_id, config.eos_ids) == (None, None, ())
    content["num_key_value_heads"] = content.pop("num_attention_heads") and None
    assert JambaConfig.from_hf(content | {"hidden_size": 4096}).num_kv_heads == 32


def test_a_missing_key_has_the_default_of_transformers():
    assert JambaConfig.from_hf({"model_type": "jamba"}) == JambaConfig()
    oracle = transformers.JambaConfig().to_dict()
    ours = JambaConfig().to_hf()
    assert {key: oracle[key] for key in ours if key in oracle} == {
        key: ours[key] for key in ours if key in oracle
    } | {"architectures": None}


@pytest.mark.parametrize("given_type", [None, "mamba", "Jamba", 3, ["jamba"]])
def test_another_model_type_is_refused(given_type):
    with pytest.raises(ConfigError, match="expected 'jamba': only Jamba models can be read"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {"model_type": given_type})


@pytest.mark.parametrize(
    "architectures", [["JambaForSequenceClassification"], [], "x", ["JambaLM"]]
)
def test_another_architecture_is_refused(architectures):
    with pytest.raises(ConfigError, match="only causal language models can be read"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {"architectures": architectures})


def test_a_file_that_says_no_inner_norms_gets_none():
    config = JambaConfig.from_hf(V01_EARLY | {"mamba_inner_layernorms": False})
    assert config == JambaConfig(inner_norms=False)


def test_rotary_positions_are_not_read_from_a_public_file():
    with pytest.raises(ConfigError, match=r"rope_theta=10000\.0, expected None"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match="unknown key 'position'"):
        JambaConfig.from_hf(PUBLIC.to_hf() | {"position": "rope"})


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="unknown key 7"):
        read_fields({"model_type": "jamba", 7: 1})


# --- transformers as the judge


def read_by_transformers(config, folder, caplog):
    """Return the config that transformers reads, failing on any warning."""
    config.save(folder)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            found = transformers.AutoConfig.from_pretrained(folder)
        finally:
            logger.removeHandler(caplog.handler)
    assert not caplog.records, [record.getMessage() for record in caplog.records]
    return found


EXTREMES = [
    PUBLIC,
    PUBLIC.replace(eos_ids=(2, 518), tie_embeddings=True, d_head=7, dt_rank=3),
    PUBLIC.replace(eos_ids=(), pad_id=None, bos_id=None, num_experts=1),
    PUBLIC.replace(attention_period=6, attention_offset=5, conv_bias=False, proj_bias=True),
    PUBLIC.replace(attention_period=1, attention_offset=0, norm_eps=1e-5, expand=3),
]


@pytest.mark.parametrize("config", EXTREMES)
def test_transformers_reads_what_is_written_without_a_warning(config, tmp_path, caplog):
    found = read_by_transformers(config, tmp_path, caplog)
    assert type(found) is transformers.JambaConfig
    written = config.to_hf()
    eos = written["eos_token_id"]
    assert found.eos_token_id == eos
    for key, value in written.items():
        assert getattr(found, key) == value, key


@given(configs(public=True))
def test_values_survive_the_way_through_transformers(config):
    through = transformers.JambaConfig(**config.to_hf()).to_dict()
    assert JambaConfig.from_hf(through) == config


@given(configs().filter(lambda config: not config.is_public))
@example(PUBLIC.replace(position="rope"))
@example(PUBLIC.replace(inner_norms=False))
def test_transformers_refuses_what_it_would_compute_otherwise(config):
    content = config.to_hf()
    assert content["model_type"] == "jamba_lm"
    with pytest.raises((ValueError, KeyError), match="jamba_lm"):
        transformers.AutoConfig.for_model(**content)
    with pytest.raises(AttributeError, match="layers_block_type"):
        transformers.JambaConfig(**content)


@pytest.mark.parametrize("change", [{"position": "rope"}, {"inner_norms": False}])
def test_transformers_refuses_a_folder_of_our_own_kind(change, tmp_path):
    PUBLIC.replace(**change).save(tmp_path)
    with pytest.raises(ValueError, match="model type `jamba_lm`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    # Naming the class skips the check of the type, which then is only a warning.
    with pytest.raises(AttributeError, match="layers_block_type"):
        transformers.JambaForCausalLM.from_pretrained(tmp_path)


# --- files that nobody vouches for


@settings(max_examples=400)
@given(config_files())
@example(b'{"model_type": "jamba", "eos_token_id": {"a": [1]}}')
@example(b'{"model_type": "jamba", "num_hidden_layers": 1' + b"0" * 4000 + b"}")
@example(b'{"model_type": "jamba", "hidden_size": true}')
@example(b'{"model_type": "jamba", "hidden_size": "4096"}')
@example(b'{"model_type": "jamba", "hidden_size": 64, "hidden_size": 128}')
@example(b'{"model_type": "jamba", "\\ud800\\n": 1}')
@example(b'{"model_type": "jamba", "' + b"a" * 100_000 + b'": 1}')
@example(b'{"model_type": ' + b"[" * 50_000)
def test_any_file_gives_a_config_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(data)
    try:
        config = JambaConfig.load(path)
    except ConfigError as refused:
        assert len(str(refused).splitlines()) == 1
        assert str(refused).isprintable()
        assert len(str(refused)) < 1000
    else:
        assert JambaConfig.from_hf(config.to_hf()) == config


@settings(max_examples=200)
@given(spoiled_content | st.dictionaries(st.text(max_size=9), json_values, max_size=3))
def test_any_content_gives_a_config_or_a_config_error(content):
    try:
        config = JambaConfig.from_hf(content)
    except ConfigError as refused:
        assert len(str(refused).splitlines()) == 1
    else:
        assert JambaConfig.from_hf(config.to_hf()) == config


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(JambaConfig)]), json_values, max_size=4
    )
)
def test_any_values_give_a_config_or_a_config_error(values):
    try:
        config = JambaConfig.from_dict(values)
    except ConfigError as refused:
        assert len(str(refused).splitlines()) == 1
    else:
        assert JambaConfig.from_dict(config.to_dict()) == config


# --- --set


def test_assignments_are_read_by_the_type_of_the_field():
    texts = ["d_ff=1_28", "norm_eps=1e-5", "proj_bias=true", "conv_bias=false", "pad_id=none"]
    texts += ["eos_ids=[2, 518]", "position=rope", "dt_rank=auto", " num_layers = 4 "]
    config = JambaConfig(dt_rank=8).with_set(texts)
    assert config == JambaConfig(
        d_ff=128,
        norm_eps=1e-5,
        proj_bias=True,
        conv_bias=False,
        pad_id=None,
        eos_ids=(2, 518),
        position="rope",
        num_layers=4,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_ff", "expected NAME=VALUE"),
        ("d_fff=3", "did you mean 'd_ff'"),
        ("d_ff=three", "expected a number"),
        ("d_ff=none", "expected a number"),
        ("d_ff=" + "9" * 9999, "expected a number"),
        ("conv_bias=yes", "expected true or false"),
        ("eos_ids=a,b", "expected a number"),
        ("norm_eps=nan", "expected a number"),
        ("position=", "expected 'none' or 'rope'"),
    ],
)
def test_an_assignment_that_cannot_be_read_is_one_line(text, message):
    with pytest.raises(ConfigError, match=message):
        JambaConfig().with_set([text])


@given(configs())
def test_every_field_can_be_assigned_as_text(config):
    def written(value):
        if isinstance(value, list):
            return ",".join(map(str, value))
        return {None: "none", True: "true", False: "false"}.get(value, str(value))

    # 1 and 1.0 are True as dictionary keys, so numbers are written before.
    texts = [
        f"{name}={value if type(value) in (int, float, str) else written(value)}"
        for name, value in config.to_dict().items()
    ]
    assert JambaConfig().with_set(texts) == config


def test_upper_bounds_leave_room_for_every_known_model():
    for name, (low, high) in config_module._INTEGERS.items():
        if name not in ("d_head", "dt_rank"):
            value = getattr(JambaConfig(), name)
            assert low <= 4 * value <= high, name
