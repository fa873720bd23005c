"""A model from nothing starts as Mamba's own recipe says, the same for the same seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jamba_lm.language_model import from_config
from jamba_lm.model.initialization import DT_MAX, DT_MIN, initial_value
from tests.arms import SMALL


def test_the_steps_of_the_scan_start_between_a_thousandth_and_a_tenth():
    bias = initial_value(
        SMALL.replace(d_model=4096), "blocks.0.mixer.dt_bias_C", (8192,), torch.float32, seed=0
    )
    step = F.softplus(bias.double())
    assert float(step.min()) >= DT_MIN * 0.999
    assert float(step.max()) <= DT_MAX * 1.001
    # Log-uniform: half of them below the geometric mean.
    below = float((step < (DT_MIN * DT_MAX) ** 0.5).double().mean())
    assert 0.47 < below < 0.53


def test_decays_start_at_one_to_n_and_skips_at_one():
    decoder = from_config(SMALL).decoder
    mixer = decoder.blocks[0].mixer
    expected = torch.arange(1, 17).float().expand(SMALL.d_inner, 16)
    torch.testing.assert_close(mixer.log_decay_CN.exp(), expected)
    assert torch.equal(mixer.skip_C, torch.ones(SMALL.d_inner))


def test_every_parameter_gets_a_value_and_the_seed_decides_which():
    one, same, other = (from_config(SMALL, seed=seed).decoder for seed in (3, 3, 4))
    drawn = 0
    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.isfinite(a).all(), name
        assert torch.equal(a, b), name
        drawn += not torch.equal(a, c)
    assert drawn > 10


def test_projections_into_the_residual_stream_shrink_with_depth():
    config = SMALL.replace(d_model=256, num_layers=8)
    plain = initial_value(config, "blocks.0.mixer.in_proj.weight", (256, 256), torch.float32, 0)
    scaled = initial_value(config, "blocks.0.mixer.out_proj.weight", (256, 256), torch.float32, 0)
    assert 3.6 < float(plain.std() / scaled.std()) < 4.4  # sqrt(2 * 8) = 4


def test_decays_are_float32_in_a_bfloat16_model():
    decoder = from_config(SMALL, dtype="bf16").decoder
    assert decoder.blocks[0].mixer.log_decay_CN.dtype == torch.float32
    assert decoder.blocks[0].mixer.dt_bias_C.dtype == torch.bfloat16
    assert decoder.embedding.weight.dtype == torch.bfloat16
