"""An adapter is W + scale * B A, whatever its matrix is kept in, and drops what its pass says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.checkpoint.adapter import Adapter, LowRank, merge_into
from jamba_lm.data import IGNORED
from jamba_lm.errors import CheckpointError, InputError, RecipeError
from jamba_lm.finetuning.linears import USUAL, chosen_places, known_targets, linear_places
from jamba_lm.finetuning.low_rank import (
    LowRankLinear,
    ThroughPacked,
    adapters,
    as_adapter,
    draw_values,
    insert,
    let_gradients_through,
    name_pass,
)
from jamba_lm.kernels.ops import BACKENDS
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.batch import Batch
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import dequantize_decoder, quantize_decoder, use_backend
from jamba_lm.training import loss
from jamba_lm.training.output import losses_of
from tests.arms import random_ids, shaken_model
from tests.tiny_checkpoint import tiny_config
from tests.tolerances import FINETUNING, assert_within

IDS = random_ids(tiny_config(), 12)


def adapted(scheme: str | None = None, dropout: float = 0.0) -> LanguageModel:
    """Return a model with adapters everywhere, none of them zero."""
    model = shaken_model(tiny_config())
    if scheme is not None:
        quantize_decoder(model.decoder, find_scheme(scheme))
        dequantize_decoder(model.decoder, layers=False)
    places = chosen_places(model.decoder, [*USUAL, "router", "embedding", "head"])
    let_gradients_through(model.decoder)
    insert(model.decoder, places, rank=3, scale=0.7, dropout=dropout)
    draw_values(model.decoder, seed=1)
    draw = torch.Generator().manual_seed(2)
    for _, module in adapters(model.decoder):
        module.lora_B.weight.data = 0.1 * torch.randn(module.lora_B.weight.shape, generator=draw)
    return model


def hidden(model: LanguageModel) -> Tensor:
    return model.decoder(torch.tensor(IDS), Batch.of([len(IDS)]), hidden=True)


def test_an_adapter_starts_as_nothing():
    model = shaken_model(tiny_config())
    before = hidden(model)
    insert(model.decoder, linear_places(model.decoder), rank=3, scale=2.0, dropout=0.0)
    draw_values(model.decoder, seed=1)
    assert torch.equal(hidden(model), before)


def test_beside_a_matrix_or_inside_it_is_the_same():
    model = adapted()
    masters = {n: p for n, p in model.decoder.named_parameters() if p.requires_grad}
    adapter = as_adapter(model.decoder, masters, None)
    plain = shaken_model(tiny_config())
    merge_into(plain.decoder, adapter)
    assert_within(hidden(model), hidden(plain), FINETUNING["merged"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_gradient_goes_through_packed_matrices_as_through_plain_ones(scheme, backend):
    packed, plain = adapted(scheme), adapted(scheme)
    use_backend(packed.decoder, backend)
    assert any(isinstance(one, PackedLinear) for one in packed.decoder.modules())
    for name, module in list(plain.decoder.named_modules()):
        if isinstance(module, ThroughPacked):
            linear = torch.nn.Linear(module.packed.weight.shape[1], module.packed.weight.shape[0])
            linear.weight = torch.nn.Parameter(
                module.packed.weight.dequantize(), requires_grad=False
            )
            linear.bias = module.packed.bias  # type: ignore[assignment]
            owner, _, leaf = name.rpartition(".")
            setattr(plain.decoder.get_submodule(owner), leaf, linear)
    for model in (packed, plain):
        hidden(model).square().sum().backward()
    for name, parameter in plain.decoder.named_parameters():
        if parameter.grad is not None:
            found = packed.decoder.get_parameter(name).grad
            assert found is not None, name
            assert_within(found, parameter.grad, FINETUNING[f"through packed, {backend}"], name)


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_loss_behind_an_adapted_head_is_that_of_its_logits(monkeypatch, scheme, dropout):
    """Logits are made in pieces, and of two products: never as a whole, as they are here."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 5)
    in_pieces, whole = adapted(scheme, dropout), adapted(scheme, dropout)
    targets_M = torch.tensor([*IDS[1:], IGNORED])
    for model in (in_pieces, whole):
        name_pass(model.decoder, 3, seed=1)
    found = losses_of(in_pieces.decoder, hidden(in_pieces), targets_M)
    logits_MV = whole.decoder(torch.tensor(IDS), Batch.of([len(IDS)]))
    expected = F.cross_entropy(logits_MV, targets_M, ignore_index=IGNORED, reduction="sum")
    for total in (found.total, expected):
        total.backward()
    assert_within(found.total, expected, FINETUNING["merged"])
    for path in ("head.lora_A", "head.lora_B", "blocks.0.mixer.in_proj.lora_B"):
        one, other = (m.decoder.get_parameter(f"{path}.weight").grad for m in (in_pieces, whole))
        assert one is not None
        assert other is not None
        assert float(other.abs().max()) > 0, path
        assert_within(one, other, FINETUNING["merged"], path)


def test_only_adapters_are_trained_and_every_one_of_them():
    model = adapted()
    trained = {name for name, p in model.decoder.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.{factor}.weight"
        for path, _ in adapters(model.decoder)
        for factor in ("lora_A", "lora_B")
    }
    assert len(trained) == 2 * len(linear_places(shaken_model(tiny_config()).decoder))


def test_what_is_dropped_follows_from_the_pass_and_the_module():
    model = adapted(dropout=0.5)
    name_pass(model.decoder, 3, seed=1)
    first, again = hidden(model), hidden(model)
    assert torch.equal(first, again)
    name_pass(model.decoder, 4, seed=1)
    assert not torch.equal(hidden(model), first)
    draws = [module.draw for _, module in adapters(model.decoder)]
    assert len(set(draws)) == len(draws)
    with torch.no_grad():
        assert torch.equal(hidden(model), hidden(adapted())), "nothing is dropped without gradients"


def test_dropout_keeps_the_mean():
    module = LowRankLinear(torch.nn.Linear(64, 8), 64, 8, rank=2, scale=1.0, dropout=0.25)
    kept = module._kept(torch.ones(1000, 64))
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("target", known_targets())
def test_every_target_means_some_module_of_a_model_that_has_all_kinds(target):
    places = chosen_places(shaken_model(tiny_config()).decoder, [target])
    assert places
    kind, _, leaf = target.partition(".")
    assert all(kind in (one.kind, one.leaf) and leaf in ("", one.leaf) for one in places)


def test_the_usual_targets_leave_routers_and_the_embedding_out():
    decoder = shaken_model(tiny_config()).decoder
    left = set(linear_places(decoder)) - set(chosen_places(decoder, []))
    assert {one.kind for one in left} == {"router", "embedding", "head"}


@pytest.mark.parametrize("target", ["embedding", "head"])
def test_an_embedding_that_is_the_head_takes_no_adapter(target):
    decoder = shaken_model(tiny_config().replace(tie_embeddings=True)).decoder
    assert {one.kind for one in linear_places(decoder)} == {*USUAL, "router"}
    with pytest.raises(RecipeError, match=f"names '{target}', .* one matrix for embedding and"):
        chosen_places(decoder, [target])


def test_a_change_that_is_not_finite_is_refused():
    decoder = shaken_model(tiny_config()).decoder
    name = "blocks.0.mixer.in_proj.weight"
    outputs, inputs = decoder.get_parameter(name).shape
    change = LowRank(torch.full((1, inputs), torch.inf), torch.ones(outputs, 1), 1.0)
    with pytest.raises(CheckpointError, match="NaN or infinity once the adapter is added"):
        merge_into(decoder, Adapter({name: change}))


def test_a_packed_matrix_takes_no_change():
    decoder = shaken_model(tiny_config()).decoder
    quantize_decoder(decoder, find_scheme("int8"))
    name = "blocks.0.mixer.in_proj.weight"
    change = LowRank(torch.zeros(1, 32), torch.zeros(128, 1), 1.0)
    with pytest.raises(InputError, match="merge the adapter into the original model first"):
        merge_into(decoder, Adapter({name: change}))
