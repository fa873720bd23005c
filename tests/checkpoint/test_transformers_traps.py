"""One-line differences between Jambas that no exception reveals, against transformers' parts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JambaForCausalLM
from transformers.models.jamba.modeling_jamba import JambaRMSNorm

from jamba_lm.kernels.ops import BACKENDS
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.model.batch import Batch
from jamba_lm.model.norm import RMSNorm
from tests.aligned import aligned
from tests.checkpoint.oracle import (
    GRID,
    config_values,
    some_ids,
    their_logits,
    their_model,
)
from tests.tolerances import ORACLE, assert_within

PROMPT, TOKENS, SEEDS = 14, 20, range(5)
SHORT = {
    "with experts": GRID["as Jamba v0.1"] | {"num_hidden_layers": 5},
    "dense": GRID["as Jamba Reasoning 3B"]
    | {
        "num_hidden_layers": 4,
        "attention period, offset": (3, 1),
        # With a tied head random weights say the same token again and again.
        "tie_word_embeddings": False,
    },
    "only Mamba": GRID["only Mamba"],
}


def both_models(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> tuple[JambaForCausalLM, LanguageModel]:
    values = config_values(GRID["as Jamba v0.1"]) | {"num_hidden_layers": 6} | changes
    theirs = their_model(values, seed, dtype)
    theirs.save_pretrained(folder)
    return theirs, load(folder, backend="reference")


def in_steps(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    state = model.new_state()
    pieces = [ids[:PROMPT], *([one] for one in ids[PROMPT:])]
    return torch.cat([model.logits([piece], [state])[0] for piece in pieces])


def test_router_weights_are_not_rescaled_to_sum_to_one(tmp_path: Path):
    theirs, ours = both_models(tmp_path)
    x_MD = torch.randn(20, 40)
    moe = ours.decoder.blocks[1].feed_forward
    with torch.no_grad():
        expected = theirs.model.layers[1].feed_forward(x_MD[None])[0]
        found = moe(x_MD, Batch.of([20]))
        kept = moe.router(x_MD).softmax(-1).topk(2).values.sum(-1)
    assert kept.max() < 0.97  # or the two rules would hardly differ
    assert_within(found, expected, ORACLE["fp32"])


def test_expert_layers_are_those_whose_index_modulo_the_period_is_the_offset(tmp_path: Path):
    # (i + offset) % period == 0, which another port uses, would pick layer 3 here.
    both_models(tmp_path, expert_layer_period=4, expert_layer_offset=1)
    names = load_file(tmp_path / "model.safetensors")
    routers = {name.split(".")[2] for name in names if "router" in name}
    assert routers == {"1", "5"}


def test_the_convolved_half_comes_before_the_gate_in_in_proj(tmp_path: Path):
    theirs, ours = both_models(tmp_path)
    mixer, x_MD = ours.decoder.blocks[0].mixer, torch.randn(9, 40)
    with torch.no_grad():
        expected = theirs.model.layers[0].mamba(x_MD[None])[0]
        found = mixer(x_MD, Batch.of([9]), None)
        assert_within(found, expected, ORACLE["fp32"])
        mixer.in_proj.weight.copy_(mixer.in_proj.weight.roll(mixer.in_proj.out_features // 2, 0))
        swapped = mixer(x_MD, Batch.of([9]), None)
    assert float((swapped - expected).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_casts_back_before_the_gain(backend: str):
    theirs, ours = JambaRMSNorm(64, eps=1e-6), RMSNorm(64, 1e-6)
    gain = 1 + 0.3 * torch.randn(64)
    x_MD = (30 * torch.randn(50, 64)).bfloat16()
    for norm in (theirs, ours):
        norm.bfloat16().weight.data.copy_(gain)
    with torch.no_grad():
        found, expected = ours(x_MD, Batch.of([50], backend=backend)), theirs(x_MD)
        wide = x_MD.float() * torch.rsqrt(x_MD.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        once = (wide * theirs.weight.float()).bfloat16()
    assert torch.equal(found, expected)
    assert not torch.equal(once, expected)  # rounding once, after the gain, shows


def test_reading_tokens_touches_no_parameter(tmp_path: Path):
    # An older port zeroed the bias of dt during a call, to please a kernel.
    _, ours = both_models(tmp_path)
    before = {name: p.detach().clone() for name, p in ours.decoder.named_parameters()}
    versions = {name: p._version for name, p in ours.decoder.named_parameters()}
    in_steps(ours, some_ids(TOKENS))
    for name, parameter in ours.decoder.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter._version == versions[name], name


def test_decays_and_skips_stay_float32_from_file_to_file(tmp_path: Path):
    _, ours = both_models(tmp_path / "fp32")
    ours.decoder.to(torch.bfloat16)
    ours.save(tmp_path / "bf16")
    first = load_file(tmp_path / "fp32" / "model.safetensors")
    second = load_file(tmp_path / "bf16" / "model.safetensors")
    wide = [name for name in second if second[name].dtype == torch.float32]
    assert wide == [name for name in second if name.endswith((".A_log", ".D"))]
    assert all(torch.equal(first[name], second[name]) for name in wide)
    again = load(tmp_path / "bf16", dtype="bf16")
    assert again.decoder.blocks[0].mixer.log_decay_CN.dtype == torch.float32
    assert torch.equal(again.decoder.blocks[0].mixer.skip_C, first["model.layers.0.mamba.D"])


def test_decays_of_a_bfloat16_file_are_widened_on_reading(tmp_path: Path):
    theirs, ours = both_models(tmp_path, torch.bfloat16)
    assert theirs.model.layers[0].mamba.A_log.dtype == torch.bfloat16
    mixer = ours.decoder.blocks[0].mixer
    assert (ours.dtype, mixer.log_decay_CN.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixer.log_decay_CN, theirs.model.layers[0].mamba.A_log.float())


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory):
    """Their float32 and bfloat16 answers for the same bfloat16 checkpoint."""

    @cache
    def make(name: str, seed: int) -> tuple[Path, list[int], torch.Tensor, torch.Tensor]:
        folder = tmp_path_factory.mktemp("bf16")
        rough = their_model(config_values(SHORT[name]), seed, torch.bfloat16)
        rough.save_pretrained(folder)
        exact = JambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = some_ids(TOKENS, seed)
        return folder, ids, their_logits(exact, ids, PROMPT), their_logits(rough, ids, PROMPT)

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHORT)
def test_bfloat16_is_no_noisier_than_in_transformers(noise, name: str, backend: str):
    ours, theirs = [], []
    for seed in SEEDS:
        folder, ids, exact, rough = noise(name, seed)
        model = load(folder, backend=backend)
        assert model.dtype == torch.bfloat16
        ours.append((in_steps(model, ids) - exact).square().mean(-1).sqrt())
        theirs.append((rough - exact).square().mean(-1).sqrt())
    found, allowed = float(torch.cat(ours).median()), float(torch.cat(theirs).median())
    assert 0 < found <= ORACLE["bf16 noise ratio"] * allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["with experts", "dense"])
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, name: str, backend: str):
    theirs = their_model(config_values(SHORT[name]) | {"eos_token_id": None}, seed=3)
    theirs.save_pretrained(tmp_path)
    prompt = some_ids(7, seed=5)
    row = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    expected = row[0, len(prompt) :].tolist()
    assert len(expected) == 64
    assert len(set(expected)) > 10  # a model that repeats itself would hide mistakes

    model = load(tmp_path, backend=backend)
    state, piece, found = model.new_state(), prompt, []
    while len(found) < 64:
        piece = [int(model.next_logits([piece], [state]).argmax())]
        found += piece
    assert found == expected


def test_a_tied_file_may_repeat_the_head_only_if_it_is_the_embedding(tmp_path: Path):
    theirs, ours = both_models(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, {"format": "pt"})
    again = load(tmp_path, backend="reference")
    ids = some_ids(9)
    assert again.decoder.head is None
    for model in (again, ours):
        aligned(model.decoder)
    assert torch.equal(again.logits([ids])[0], ours.logits([ids])[0])
    assert_within(again.logits([ids])[0], their_logits(theirs, ids, 9), ORACLE["fp32"])
