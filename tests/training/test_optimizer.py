"""AdamW on master weights: the published algorithm, on the right parameters, losing nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from jamba_lm.errors import CheckpointError
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.training import optimizer as shards
from jamba_lm.training.optimizer import MasterAdamW, decays, learning_rate_at
from jamba_lm.training.recipe import OptimizerSection, ScheduleSection
from tests.tiny_checkpoint import tiny_config
from tests.tolerances import TRAINING, assert_within


def tiny_decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(tiny_config())
    initialize(decoder, seed=0, dtype=dtype)
    return decoder


def give_gradients(decoder: Decoder, seed: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        gradient = torch.randn(parameter.shape, generator=draw) * scale
        parameter.grad = gradient.to(parameter.dtype)


def test_only_matrices_decay():
    names = {name for name, p in tiny_decoder().named_parameters() if decays(name, p)}
    kept = {name for name, _ in tiny_decoder().named_parameters()} - names
    leaves = {name.rpartition(".")[2] for name in kept}
    assert leaves == {"weight", "log_decay_CN", "skip_C", "dt_bias_C", "conv_bias_C"}
    assert all("norm" in name or name == "embedding.weight" for name in kept if "weight" in name)
    assert {"head.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.conv_CW"} <= names


@pytest.mark.parametrize("values", [100, shards.SHARD_VALUES])
def test_a_step_is_torchs_adamw(monkeypatch, values):
    """Also where a parameter is cut into several shards."""
    monkeypatch.setattr(shards, "SHARD_VALUES", values)
    settings = OptimizerSection(weight_decay=0.3, clip_norm=1e9)
    decoder, other = tiny_decoder(), tiny_decoder()
    own = MasterAdamW(decoder, settings)
    groups = {True: [], False: []}
    for name, parameter in other.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    theirs = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.3},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for seed in range(3):
        give_gradients(decoder, seed)
        give_gradients(other, seed)
        own.collect()
        own.step(0.01)
        theirs.step()
    for (name, found), expected in zip(decoder.named_parameters(), other.parameters(), strict=True):
        assert_within(found, expected, TRAINING["adamw"], name)


def test_gradients_of_several_passes_are_summed_and_cleared():
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    give_gradients(decoder, 0)
    optimizer.collect()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    give_gradients(decoder, 0)
    optimizer.collect()
    twice = optimizer.step(0.0)
    give_gradients(decoder, 0)
    optimizer.collect()
    once = optimizer.step(0.0)
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize("values", [100, shards.SHARD_VALUES])
@pytest.mark.parametrize("last", [True, False])
def test_when_gradients_are_added_up_changes_no_bit(monkeypatch, values, last):
    """Two passes at the same time, each followed by a third one, in one order of adding."""
    monkeypatch.setattr(shards, "SHARD_VALUES", values)
    decoder, other = tiny_decoder(), tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    optimizer.share_out([other], shards.one_by_one)
    expected = {name: torch.zeros_like(one) for name, one in decoder.named_parameters()}
    skipped = "blocks.0.mixer.in_proj.weight"
    for seed, models in enumerate([(decoder, other), (decoder,)]):
        for number, model in enumerate(models):
            give_gradients(model, 10 * seed + number)
            if seed == 0:
                model.get_parameter(skipped).grad = None
            for name, one in model.named_parameters():
                if one.grad is not None:
                    expected[name] += one.grad
        optimizer.collect(len(models), last=last)
        assert all(one.grad is None for model in models for one in model.parameters())
    found = optimizer.gradients()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    norm = torch.cat([one.flatten() for one in expected.values()]).norm().item()
    assert optimizer.step(0.0) == pytest.approx(norm, rel=1e-5)


def test_an_expert_that_no_row_was_sent_to_has_a_gradient_of_zero():
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    give_gradients(decoder, 0)
    optimizer.collect()
    optimizer.step(0.01)
    give_gradients(decoder, 1)
    name = "blocks.0.mixer.in_proj.weight"
    decoder.get_parameter(name).grad = None
    optimizer.collect()
    assert optimizer.gradients()[name].count_nonzero() == 0


def test_the_norm_is_told_for_each_parameter_and_for_all(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_VALUES", 100)
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    give_gradients(decoder, 0)
    expected = {name: p.grad.norm().item() for name, p in decoder.named_parameters()}
    whole = torch.cat([p.grad.flatten() for p in decoder.parameters()]).norm().item()
    optimizer.collect()
    found = optimizer.gradient_norms()
    assert found == pytest.approx(expected, rel=1e-5)
    assert shards.whole_norm(found) == pytest.approx(whole, rel=1e-5)


def test_what_was_collected_can_be_forgotten():
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    give_gradients(decoder, 0, scale=100.0)
    optimizer.collect()
    optimizer.forget()
    give_gradients(decoder, 1)
    expected = torch.cat([p.grad.flatten() for p in decoder.parameters()]).norm().item()
    optimizer.collect()
    assert optimizer.step(0.0) == pytest.approx(expected, rel=1e-5)


def test_clipping_bounds_the_whole_gradient():
    def first_moment(scale):
        decoder = tiny_decoder()
        optimizer = MasterAdamW(decoder, OptimizerSection(clip_norm=0.5, beta1=0.0))
        give_gradients(decoder, 1, scale)
        optimizer.collect()
        norm = optimizer.step(0.0)
        moments = [t for name, t in optimizer.tensors().items() if name.startswith("first")]
        return norm, torch.cat([moment.flatten() for moment in moments]).norm().item()

    small, unchanged = first_moment(1e-5)
    assert small < 0.5
    assert unchanged == pytest.approx(small)
    large, clipped = first_moment(10.0)
    assert large > 0.5
    assert clipped == pytest.approx(0.5)


def test_steps_below_the_models_precision_are_not_lost():
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection(weight_decay=0.0, beta2=0.9))
    decoder.to(torch.bfloat16)
    weight = decoder.get_parameter("blocks.0.mixer.in_proj.weight")
    assert weight.dtype == torch.bfloat16
    before = weight.detach().clone()
    master = optimizer.masters()["blocks.0.mixer.in_proj.weight"].clone()
    for _ in range(200):
        for parameter in decoder.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.collect()
        optimizer.step(1e-5)
    moved = master - optimizer.masters()["blocks.0.mixer.in_proj.weight"]
    assert_within(moved, torch.full_like(moved, 200 * 1e-5), TRAINING["many small steps"])
    assert (weight != before).any()
    assert torch.equal(weight, optimizer.masters()["blocks.0.mixer.in_proj.weight"].bfloat16())


def test_decays_and_skips_stay_float32_in_a_bfloat16_model():
    decoder = tiny_decoder()
    MasterAdamW(decoder, OptimizerSection())
    decoder.to(torch.bfloat16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in decoder.named_parameters()}
    assert kinds["log_decay_CN"] == kinds["skip_C"] == torch.float32
    assert kinds["weight"] == torch.bfloat16


def test_a_gradient_that_is_not_finite_changes_nothing():
    decoder = tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    give_gradients(decoder, 0)
    next(decoder.parameters()).grad.fill_(float("inf"))
    optimizer.collect()
    assert optimizer.step(0.1) == float("inf")
    assert all(torch.equal(before[name], now) for name, now in optimizer.tensors().items())


def test_restored_it_goes_on_with_the_same_bits():
    decoder, other = tiny_decoder(), tiny_decoder()
    optimizer = MasterAdamW(decoder, OptimizerSection())
    for seed in range(2):
        give_gradients(decoder, seed)
        optimizer.collect()
        optimizer.step(0.01)
    copied = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    resumed = MasterAdamW(other, OptimizerSection())
    resumed.restore(copied, steps_done=2)
    for seed in range(2, 4):
        for one, model in ((optimizer, decoder), (resumed, other)):
            give_gradients(model, seed)
            one.collect()
            one.step(0.01)
    for found, expected in zip(other.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("damage", ["missing", "left over", "shape", "dtype"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage):
    optimizer = MasterAdamW(tiny_decoder(), OptimizerSection())
    tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    name = "master.embedding.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "left over":
        tensors["master.more"] = tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][1:]
    else:
        tensors[name] = tensors[name].double()
    with pytest.raises(CheckpointError, match="1 tensors differ"):
        optimizer.restore(tensors, steps_done=1)


def test_a_cosine_warms_up_peaks_and_ends_at_its_fraction():
    schedule = ScheduleSection(kind="cosine", warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate_at(step, 100, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)


def test_warmup_stable_decay_can_be_lengthened_after_it_started():
    schedule = ScheduleSection(
        kind="warmup-stable-decay", warmup_steps=5, decay_steps=20, final_fraction=0.0
    )
    short = [learning_rate_at(step, 50, 1.0, schedule) for step in range(50)]
    long = [learning_rate_at(step, 80, 1.0, schedule) for step in range(80)]
    assert short[:30] == long[:30]
    assert short[29] == 1.0
    assert short[40] == pytest.approx(0.5)
    assert long[60] == 1.0
    assert long[79] == pytest.approx(1 / 20)
