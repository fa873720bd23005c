"""The released shapes are what was released."""

from __future__ import annotations

import pytest

from jamba_lm.analysis.memory import parameter_counts, weight_bytes
from jamba_lm.config import JambaConfig
from jamba_lm.errors import ConfigError
from jamba_lm.presets import PRESETS, preset

# arXiv 2403.19887 and 2408.12570 round these; the 3B is called that.
RELEASED = {
    "jamba-v0.1": (51_570_323_328, 12_110_311_296),
    "jamba-1.5-mini": (51_570_323_328, 12_110_311_296),
    "jamba-1.5-large": (398_555_145_696, 94_149_338_592),
    "jamba-reasoning-3b": (3_029_337_472, 3_029_337_472),
    "jamba2-mini": (51_570_323_328, 12_110_311_296),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_its_parameters(name):
    counts = parameter_counts(preset(name))
    assert (counts.total, counts.active) == RELEASED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_by_others_and_survives_config_json(name):
    config = preset(name)
    assert config.is_public
    assert JambaConfig.from_hf(config.to_hf()) == config


def test_the_stop_tokens_tell_releases_apart():
    assert [preset(name).eos_ids for name in RELEASED] == [
        (2,),
        (2, 518),
        (2, 518),
        (2, 519),
        (519,),
    ]


def test_the_demonstration_fits_the_package():
    assert weight_bytes(preset("demo"), "bf16") <= 16 * 10**6


def test_the_benchmark_shapes_have_the_sizes_that_were_measured():
    millions = [round(parameter_counts(preset(name)).total / 1e6, 1) for name in ("tiny", "mid")]
    assert millions == [19.5, 557.9]
    assert parameter_counts(preset("3b")).total == 3_029_337_472


def test_an_unknown_preset_names_the_closest_and_all():
    with pytest.raises(ConfigError, match=r"jamba2-mini, demo.*did you mean 'jamba-1.5-mini'"):
        preset("jamba-1.5-mni")
    with pytest.raises(ConfigError, match=r"no preset 'zzz' among jamba-v0.1, .*3b$"):
        preset("zzz")


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["mine"] = JambaConfig()
