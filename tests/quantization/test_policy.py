"""The table of types: what it says of every tensor, and how a file's word for it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.memory import WEIGHT_FORMATS, weight_bytes
from jamba_lm.analysis.packing import REST, packed_parts
from jamba_lm.analysis.tensors import list_tensors
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.presets import PRESETS
from jamba_lm.quantization.policy import (
    Packing,
    Scheme,
    all_schemes,
    find_scheme,
    matrix_class,
    read_scheme,
)
from tests.arms import ARMS
from tests.config_strategies import configs

EVERY_SCHEME = pytest.mark.parametrize("scheme", all_schemes(), ids=lambda s: s.label)
# What the recurrence and the choice of experts hang on.
NEVER = ("router", "dt_proj", "conv", "norm", "dt_bias", "log_decay", "skip", "bias")


@EVERY_SCHEME
@pytest.mark.parametrize("config", [*ARMS.values(), *PRESETS.values()])
def test_what_is_delicate_stays_as_it_is(scheme: Scheme, config: JambaConfig):
    for group in list_tensors(config):
        packing = scheme.packing(group.name, group.shape)
        if packing is not None:
            assert not any(word in group.name for word in NEVER), group.name
            assert len(group.shape) == 2


def test_the_schemes_pack_what_they_say():
    kinds = {
        scheme.label: {
            matrix_class(group.name): packing
            for group in list_tensors(PRESETS["jamba-v0.1"])
            if (packing := scheme.packing(group.name, group.shape)) is not None
        }
        for scheme in all_schemes()
    }
    eight = Packing("int8")
    assert kinds["experts-int8"] == {"experts": eight, "MLP": eight}
    assert set(kinds["int8"].values()) == {eight}
    assert set(kinds["int8"]) == set(kinds["int4"]) == set(kinds["int4-32"])
    for label, group in (("experts-int4", 64), ("experts-int4-32", 32)):
        assert kinds[label] == {**kinds["int8"], "experts": Packing("int4", group)}
    for label, group in (("int4", 64), ("int4-32", 32)):
        for matrices in ("experts", "MLP", "in_proj", "attention"):
            assert kinds[label][matrices] == Packing("int4", group)
        for matrices in ("x_proj", "embedding", "head"):
            assert kinds[label][matrices] == eight


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (128, Packing("int4", 64)),
        (96, Packing("int4", 32)),
        (48, Packing("int8")),
        (1, Packing("int8")),
    ],
)
def test_inputs_that_do_not_divide_take_the_next_type_that_fits(inputs, expected):
    assert find_scheme("int4").packing("blocks.0.mixer.in_proj.weight", (10, inputs)) == expected


@given(configs(), st.sampled_from(all_schemes()))
def test_the_parts_add_up_to_the_whole(config, scheme):
    parts = packed_parts(config, scheme, 2)
    assert sum(part.num_bytes for part in parts) == weight_bytes(config, scheme.label)
    assert sum(part.values for part in parts) == sum(
        g.copies * g.values for g in list_tensors(config)
    )
    assert any(part.matrices == REST for part in parts)


def test_every_scheme_can_be_planned_with():
    assert {scheme.label for scheme in all_schemes()} == set(WEIGHT_FORMATS) - {
        "fp32",
        "bf16",
        "fp16",
    }


def test_four_bits_take_no_more_than_five_on_released_models():
    released = {name: config for name, config in PRESETS.items() if name.startswith("jamba")}
    assert len(released) == 5
    for name, config in released.items():
        values = sum(group.copies * group.values for group in list_tensors(config))
        assert 8 * weight_bytes(config, "int4") / values < 5, name


@EVERY_SCHEME
def test_a_scheme_is_found_by_its_label_and_in_its_own_words(scheme: Scheme):
    assert find_scheme(scheme.label) == scheme
    assert read_scheme({"quantization_config": scheme.to_json()}, "config.json") == scheme
    assert scheme.description


def test_no_word_means_no_scheme():
    assert read_scheme({}, "config.json") is None
    assert read_scheme({"quantization_config": None}, "config.json") is None


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        (
            "int5",
            None,
            "no quantisation scheme 'int5': expected one of experts-int8, int8, experts-int4",
        ),
        ("int-8", None, "did you mean 'int8'"),
        ("int8", 32, "scheme 'int8': it goes with 4 bits alone, which experts-int4 and int4 have"),
        ("int4-32", 64, "a group of 64 was given with scheme 'int4-32'"),
        ("int4", 48, "the group is 48: expected one of 32, 64"),
        ("int4", -1, "the group is -1"),
    ],
)
def test_a_wrong_wish_is_refused(name, group, message):
    with pytest.raises(InputError, match=message):
        find_scheme(name, group)


OURS = {"quant_method": "jamba_lm", "scheme": "int4", "group_size": 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**OURS, "quant_method": "gptq"}, "it is not of method 'jamba_lm'"),
        ("int4", "it is not of method"),
        ({**OURS, "scheme": "int3"}, "scheme is 'int3', expected one of"),
        ({**OURS, "scheme": ["int4"]}, "scheme is \\['int4'\\]"),
        ({**OURS, "scheme": "int4-32"}, "scheme is 'int4-32'"),
        ({**OURS, "group_size": 128}, "group_size is 128, expected one of \\[32, 64\\]"),
        ({**OURS, "group_size": 64.0}, "group_size is 64.0"),
        ({**OURS, "group_size": True}, "group_size is True"),
        ({"quant_method": "jamba_lm", "scheme": "int4"}, "group_size is missing"),
        ({**OURS, "scheme": "int8"}, "'group_size' says nothing under 'int8'"),
        ({**OURS, "grup_size": 64}, "'grup_size' says nothing .*did you mean 'group_size'"),
        ({**OURS, "zero_point": True}, "'zero_point' says nothing"),
    ],
)
def test_a_file_that_says_something_else_is_refused(content, message):
    with pytest.raises(CheckpointError, match=message):
        read_scheme({"quantization_config": content}, "config.json")
