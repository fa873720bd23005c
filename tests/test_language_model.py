"""The library's front door: load, from_config, logits, save, fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import jamba_lm
from jamba_lm.errors import BackendUnavailable, InputError
from tests.aligned import aligned
from tests.arms import ARMS, SMALL, random_ids, shaken_model


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_saved_and_loaded(arm: str, tmp_path: Path):
    model = shaken_model(ARMS[arm])
    model.save(tmp_path / "model")
    loaded = jamba_lm.load(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint
    aligned(loaded.decoder)
    ids = random_ids(SMALL, 12)
    assert torch.equal(loaded.logits([ids])[0], model.logits([ids])[0])


def test_logits_are_float32_and_one_row_per_token():
    model = shaken_model(SMALL, dtype="bf16")
    one, two = model.logits([[1, 2, 3], [4]])
    assert one.dtype == two.dtype == torch.float32
    assert one.shape == (3, SMALL.vocab_size)
    assert two.shape == (1, SMALL.vocab_size)
    assert not one.requires_grad


def test_next_logits_are_the_last_rows_and_move_the_states():
    model = shaken_model(SMALL)
    states = [model.new_state(), model.new_state()]
    found = model.next_logits([[1, 2, 3], [4]], states)
    expected = torch.stack([rows[-1] for rows in model.logits([[1, 2, 3], [4]])])
    torch.testing.assert_close(found, expected)
    assert [state.ids for state in states] == [[1, 2, 3], [4]]


def test_last_logits_are_the_rows_asked_for_and_move_the_states():
    model = shaken_model(SMALL)
    sequences = [random_ids(SMALL, 5), random_ids(SMALL, 3, seed=1), random_ids(SMALL, 1, seed=2)]
    states = [model.new_state() for _ in sequences]
    found = model.last_logits(sequences, [2, 3, 1], states)
    expected = model.logits(sequences)
    for rows, all_rows, count in zip(found, expected, [2, 3, 1], strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, all_rows[-count:])
    assert [state.ids for state in states] == sequences


@pytest.mark.parametrize("wrong", [-1, 97, 2**40, 2**70])
def test_ids_out_of_range_are_refused(wrong: int):
    model = shaken_model(SMALL)
    state = model.new_state()
    with pytest.raises(InputError, match=r"out of range: expected 0\.\.96"):
        model.logits([[1, wrong]], [state])
    assert state.num_tokens == 0


@pytest.mark.parametrize("wrong", [["a"], [None], [1.5]])
def test_ids_that_are_no_integers_are_refused(wrong: list):
    with pytest.raises(InputError, match=r"token id 0 is .*: expected an int"):
        shaken_model(SMALL).logits([wrong])


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(BackendUnavailable, match="reference"):
        jamba_lm.from_config(SMALL, backend="quantum")


def test_an_unknown_dtype_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        jamba_lm.from_config(SMALL, dtype="int3")
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        jamba_lm.load(tmp_path, dtype="int3")


def test_the_fingerprint_sees_one_training_step():
    model = shaken_model(SMALL)
    before = model.fingerprint
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.001)
    assert jamba_lm.LanguageModel(model.config, model.decoder).fingerprint != before


def test_the_package_names_what_it_has():
    for name in jamba_lm.__all__:
        assert getattr(jamba_lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        _ = jamba_lm.lood
