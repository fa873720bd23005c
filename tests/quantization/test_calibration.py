"""A decoder packed for a text: what is packed, what it gains, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.kernels.packed_weights import Int4Weight
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.model.batch import Batch
from jamba_lm.presets import embedded_model_path
from jamba_lm.quantization import calibration
from jamba_lm.quantization.calibration import calibrate_decoder
from jamba_lm.quantization.error_feedback import quantize_int4_for
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import (
    PlainWeights,
    quantize_decoder,
    scheme_of,
    stored_tensors,
)
from jamba_lm.text.tokenizer import load_tokenizer
from tests.arms import ARMS, SMALL, random_ids, shaken_model

HELD_OUT = Path(__file__).parents[1] / "data" / "held_out.jsonl"
# Wide enough for groups everywhere.
WIDE = SMALL.replace(d_model=64, d_ff=64)


def texts(config, number=6, length=90):
    return [random_ids(config, length + seed, seed=seed) for seed in range(number)]


def stored(model):
    return dict(stored_tensors(model.decoder))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("label", ["int4", "int4-32"])
@pytest.mark.parametrize("arm", ARMS)
def test_it_has_the_layout_of_any_other(arm, label, dtype):
    scheme = find_scheme(label)
    config = ARMS[arm].replace(d_model=64, d_head=None)
    model, plain = (shaken_model(config, dtype=dtype) for _ in range(2))
    calibrate_decoder(model.decoder, scheme, texts(config))
    quantize_decoder(plain.decoder, scheme)
    assert scheme_of(model.decoder) == scheme
    found, expected = stored(model), stored(plain)
    assert found.keys() == expected.keys()
    changed = set()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        if not torch.equal(tensor, expected[name]):
            changed.add(name)
    # Nothing but the steps within grids, and of nearly every matrix that has them.
    assert all(name.endswith(".packed") for name in changed)
    in_4_bits = {name for name in expected if name.endswith(".packed")}
    assert len(changed) > 0.8 * len(in_4_bits)
    rows8 = {
        name: module.rows8
        for name, module in plain.decoder.named_modules()
        if isinstance(module, PackedLinear)
    }
    assert rows8 == {
        name: module.rows8
        for name, module in model.decoder.named_modules()
        if isinstance(module, PackedLinear)
    }


def test_each_layer_is_rounded_for_what_the_rounded_one_before_it_gives():
    """The second layer's first matrix meets rows that the packed first layer made."""
    scheme, sequences = find_scheme("int4"), texts(WIDE)
    model, by_hand = (shaken_model(WIDE) for _ in range(2))
    calibrate_decoder(model.decoder, scheme, sequences)
    # The first layer from the packed model, the second plain: what its norm gives is what is met.
    by_hand.decoder.embedding = model.decoder.embedding
    by_hand.decoder.blocks[0] = model.decoder.blocks[0]
    met = []
    hook = by_hand.decoder.blocks[1].mixer.in_proj.register_forward_pre_hook(
        lambda module, arguments: met.append(arguments[0])
    )
    for ids in sequences:
        by_hand.decoder(torch.tensor(ids), Batch.of([len(ids)]))
    hook.remove()
    expected = quantize_int4_for(
        by_hand.decoder.blocks[1].mixer.in_proj.weight.detach(), torch.cat(met), 64
    )
    found = model.decoder.blocks[1].mixer.in_proj.weight
    assert isinstance(found, Int4Weight)
    assert (found.steps() == expected.steps()).float().mean() > 0.99


def test_where_texts_are_cut_into_calls_does_not_matter(monkeypatch):
    found = []
    for tokens in (1, 200, 10_000):
        monkeypatch.setattr(calibration, "CALL_TOKENS", tokens)
        model = shaken_model(WIDE)
        calibrate_decoder(model.decoder, find_scheme("int4"), texts(WIDE))
        found.append(model)
    first, *others = (
        torch.cat([w.flatten() for w in PlainWeights(one.decoder).values()]) for one in found
    )
    for other in others:
        # Sums in another order: a value halfway between two steps may fall to the other side.
        assert (first == other).float().mean() > 0.99


def test_the_embedded_model_loses_less_of_text_that_it_was_not_rounded_for():
    folder = embedded_model_path()
    tokenizer, original = load_tokenizer(folder), load(folder, dtype="fp32")
    documents = [json.loads(line)["text"] for line in HELD_OUT.read_text("utf-8").splitlines()]
    ids = [tokenizer.encode(one[:2000], add_bos=True)[:256] for one in documents]
    met, other = ids[:40:2], ids[1:40:2]
    packed = load(folder, dtype="fp32")
    calibrate_decoder(packed.decoder, find_scheme("int4"), met)
    plain = load(folder, dtype="fp32", quantize="int4")

    def divergence(model: LanguageModel) -> float:
        total, tokens = 0.0, 0
        for one in other:
            truth = original.logits([one])[0].double().log_softmax(-1)
            found = model.logits([one])[0].double().log_softmax(-1)
            total += float((truth.exp() * (truth - found)).sum())
            tokens += len(one)
        return total / tokens

    gain = divergence(packed) / divergence(plain)
    assert gain < 0.85, gain


def test_progress_counts_every_value_once():
    said = []
    model = shaken_model(WIDE)
    expected = []
    quantize_decoder(shaken_model(WIDE).decoder, find_scheme("int4"), lambda *a: expected.append(a))
    calibrate_decoder(model.decoder, find_scheme("int4"), texts(WIDE), lambda *a: said.append(a))
    assert len(said) == len(expected)
    assert said[-1] == expected[-1]
    assert said == sorted(said)


def test_what_cannot_be_calibrated_is_refused():
    model = shaken_model(WIDE)
    before = {name: one.detach().clone() for name, one in model.decoder.named_parameters()}
    int4 = find_scheme("int4")
    with pytest.raises(InputError, match=r"int8 has no matrix in 4 bits.*take int4"):
        calibrate_decoder(model.decoder, find_scheme("int8"), texts(WIDE))
    for nothing in ([], [[]]):
        with pytest.raises(InputError, match="nothing to calibrate with"):
            calibrate_decoder(model.decoder, int4, nothing)
    with pytest.raises(InputError, match="97"):
        calibrate_decoder(model.decoder, int4, [[1, 97]])
    after = dict(model.decoder.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    calibrate_decoder(model.decoder, int4, texts(WIDE))
    with pytest.raises(InputError, match="quantised already"):
        calibrate_decoder(model.decoder, int4, texts(WIDE))


def test_numbers_that_are_none_are_refused():
    model = shaken_model(WIDE)
    with torch.no_grad():
        model.decoder.blocks[1].mixer.in_proj.weight[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mixer\.in_proj\.weight holds NaN"):
        calibrate_decoder(model.decoder, find_scheme("int4"), texts(WIDE))
    model = shaken_model(WIDE)
    with torch.no_grad():
        model.decoder.blocks[1].mixer_norm.weight.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="layer 1 makes NaN or infinity of the text"):
        calibrate_decoder(model.decoder, find_scheme("int4"), texts(WIDE))
