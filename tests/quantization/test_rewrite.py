"""A decoder rewritten to packed weights: what changes, what does not, and the way back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.errors import BackendUnavailable, CheckpointError, InputError
from jamba_lm.kernels.packed_weights import Int8Weight
from jamba_lm.language_model import LanguageModel, load, load_state
from jamba_lm.quantization.linear import PackedEmbedding, PackedLinear
from jamba_lm.quantization.policy import all_schemes, find_scheme
from jamba_lm.quantization.rewrite import (
    PlainWeights,
    dequantize_decoder,
    quantize_decoder,
    scheme_of,
    stored_tensors,
)
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.tolerances import ANY_SPLIT, STEP, assert_within

LABELS = [scheme.label for scheme in all_schemes()]
TIED = "narrow convolution, tied, one key head"


# The definition rounds no activation; native code rounds the inputs of packed matrices.
BACKENDS = {"reference": ANY_SPLIT["fp32"], "native": STEP["packed"]}


def packed_model(
    arm: str, label: str, dtype: str = "fp32", backend: str | None = None
) -> LanguageModel:
    model = shaken_model(ARMS[arm], dtype=dtype)
    quantize_decoder(model.decoder, find_scheme(label))
    return LanguageModel(model.config, model.decoder, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("arm", ARMS)
def test_a_quantised_model_is_the_model_of_the_weights_it_stands_for(arm, label, backend):
    model = packed_model(arm, label, backend=backend)
    ids = random_ids(model.config, 40)
    found = model.logits([ids])[0]
    dequantize_decoder(model.decoder)
    assert scheme_of(model.decoder) is None
    assert model.decoder.head is None or isinstance(model.decoder.head, nn.Linear)
    plain = LanguageModel(model.config, model.decoder, backend=backend)
    assert_within(found, plain.logits([ids])[0], BACKENDS[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("arm", ARMS)
def test_pieces_batches_and_single_tokens_say_the_same(arm, label, backend):
    model, tolerance = packed_model(arm, label, backend=backend), BACKENDS[backend]
    ids = random_ids(model.config, 70)
    whole = model.logits([ids])[0]
    state = model.new_state()
    pieces = [model.logits([ids[a:b]], [state])[0] for a, b in ((0, 1), (1, 4), (4, 69), (69, 70))]
    assert_within(torch.cat(pieces), whole, tolerance)
    other = random_ids(model.config, 13, seed=1)
    together = model.logits([other, ids])
    assert_within(together[1], whole, tolerance)
    assert_within(together[0], model.logits([other])[0], tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("arm", ARMS)
def test_its_tensors_are_as_large_as_planned(arm, label, dtype):
    model = packed_model(arm, label, dtype)
    tensors = dict(stored_tensors(model.decoder))
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert model.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    if dtype == "bf16":
        assert model.weight_bytes == weight_bytes(model.config, label)
    assert model.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


@pytest.mark.parametrize("label", LABELS)
def test_a_decoder_tells_its_scheme(label):
    # Wide enough that no two schemes come to the same.
    model = shaken_model(SMALL.replace(d_model=64, d_ff=64))
    assert scheme_of(model.decoder) is None
    quantize_decoder(model.decoder, find_scheme(label))
    assert scheme_of(model.decoder) == find_scheme(label)


def test_single_modules_replaced_by_hand_follow_no_scheme():
    model = shaken_model(SMALL)
    mixer = model.decoder.blocks[0].mixer
    mixer.in_proj = PackedLinear(Int8Weight.quantize(mixer.in_proj.weight.detach()))
    with pytest.raises(ValueError, match="follow no scheme"):
        scheme_of(model.decoder)


def test_the_original_is_let_go_matrix_by_matrix():
    model = shaken_model(SMALL)
    originals = {
        name: weakref.ref(parameter)
        for name, parameter in model.decoder.named_parameters()
        if find_scheme("int8").packing(name, parameter.shape) is not None
    }
    alive = []

    def count(done: int, total: int) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in originals.values()))

    quantize_decoder(model.decoder, find_scheme("int8"), count)
    # The one just packed may still be held by the caller.
    assert alive == sorted(alive, reverse=True)
    assert alive[0] <= len(originals)
    assert alive[-1] == 0


def test_a_tied_head_shares_the_embedding_s_bytes():
    decoder = packed_model(TIED, "int8").decoder
    assert isinstance(decoder.embedding, PackedEmbedding)
    assert isinstance(decoder.head, PackedLinear)
    assert decoder.head.weight is decoder.embedding.weight


def test_a_bias_is_kept():
    model = shaken_model(ARMS[TIED])
    bias = model.decoder.blocks[0].mixer.in_proj.bias
    quantize_decoder(model.decoder, find_scheme("int4"))
    assert model.decoder.blocks[0].mixer.in_proj.bias is bias
    dequantize_decoder(model.decoder)
    assert model.decoder.blocks[0].mixer.in_proj.bias is bias


def test_another_dtype_leaves_scales_alone():
    model = packed_model(TIED, "int8")
    before = {name: tensor.clone() for name, tensor in stored_tensors(model.decoder)}
    model.decoder.to(torch.bfloat16)
    after = dict(stored_tensors(model.decoder))
    packed = [name for name in before if name.endswith((".values", ".scale"))]
    assert packed
    for name in packed:
        assert after[name].dtype is before[name].dtype
        assert torch.equal(after[name], before[name])
    ids = torch.tensor([3, 4])
    assert model.decoder.embedding(ids).dtype is torch.bfloat16
    assert LanguageModel(model.config, model.decoder).logits([[3, 4]])[0].isfinite().all()


def test_leading_axes_of_a_packed_module_are_free():
    linear = PackedLinear(Int8Weight.quantize(torch.randn(5, 8)))
    x = torch.randn(2, 3, 8)
    assert torch.equal(linear(x), linear(x.view(6, 8)).view(2, 3, 5))
    embedding = PackedEmbedding(Int8Weight.quantize(torch.randn(9, 4)), torch.float32)
    ids = torch.tensor([[0, 8], [2, 2]])
    assert torch.equal(embedding(ids), embedding.weight.dequantize()[ids])


def test_a_named_back_end_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch):
    model = packed_model("hybrid with experts", "int8")
    reference = LanguageModel(model.config, model.decoder, backend="reference")
    assert reference.logits([[1, 2]])[0].isfinite().all()
    with pytest.raises(BackendUnavailable, match="no backend 'abacus'"):
        LanguageModel(model.config, model.decoder, backend="abacus")
    layers = [one for one in model.decoder.modules() if isinstance(one, PackedLinear)]
    assert {layer.backend for layer in layers} == {"reference"}


def test_quantising_twice_is_refused():
    model = packed_model("hybrid, dense", "int8")
    with pytest.raises(InputError, match=r"quantised already.*rounding twice"):
        quantize_decoder(model.decoder, find_scheme("int4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_is_refused_by_the_matrix_that_shows_it(bad):
    model = shaken_model(SMALL)
    with torch.no_grad():
        model.decoder.blocks[1].mixer.out_proj.weight[3, 4] = bad
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mixer\.out_proj\.weight holds NaN or"):
        quantize_decoder(model.decoder, find_scheme("int8"))


def test_plain_weights_are_those_of_the_way_back():
    model = packed_model(TIED, "int4")
    weights = PlainWeights(model.decoder)
    taken = {name: weights[name] for name in weights}
    dequantize_decoder(model.decoder)
    back = dict(model.decoder.named_parameters())
    assert taken.keys() == back.keys()
    assert len(weights) == len(back)
    for name, value in taken.items():
        assert torch.equal(value, back[name]), name


@pytest.mark.parametrize("label", LABELS)
def test_saved_states_and_fingerprints_belong_to_the_quantised_model(label, tmp_path):
    plain = shaken_model(SMALL)
    model = packed_model("hybrid with experts", label)
    assert model.fingerprint != plain.fingerprint
    state = model.new_state()
    ids = random_ids(model.config, 30)
    model.logits([ids[:20]], [state])
    state.save(tmp_path / "state")
    again = load_state(tmp_path / "state", model)
    expected = model.logits([ids[20:]], [state])[0]
    assert torch.equal(model.logits([ids[20:]], [again])[0], expected)


@pytest.mark.parametrize("label", LABELS)
def test_saving_and_loading_changes_no_bit(label, tmp_path):
    model = packed_model(TIED, label, "bf16")
    model.save(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.fingerprint == model.fingerprint
    assert again.scheme == model.scheme
    model.save(tmp_path / "plain", dequantize=True)
    plain = load(tmp_path / "plain")
    assert plain.scheme is None
    for name, value in PlainWeights(model.decoder).items():
        rounded = value if value.dtype == torch.float32 and "_C" in name else value.bfloat16()
        assert torch.equal(plain.decoder.get_parameter(name).float(), rounded.float()), name
