"""Whole = pieces, batch = singles, pack = separate documents: on every back-end, for every arm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jamba_lm
from jamba_lm.errors import InputError
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.batch import Batch
from jamba_lm.model.state import SequenceState
from tests.arms import ARMS, random_ids, shaken_model
from tests.tolerances import ANY_SPLIT, assert_within

BACKENDS = ("reference", "native")
PIECES = (1, 2, 3, 4, 5, 63, 64, 65)

_models: dict[tuple[str, str], LanguageModel] = {}


def model_of(arm: str, backend: str) -> LanguageModel:
    if (arm, backend) not in _models:
        _models[arm, backend] = shaken_model(ARMS[arm], backend=backend)
    return _models[arm, backend]


def in_pieces(
    model: LanguageModel, ids: list[int], sizes: list[int], state: SequenceState
) -> Tensor:
    """Feed `ids` in pieces of the given sizes, the last one taking what is left."""
    parts, first = [], 0
    for size in [*sizes, len(ids)]:
        piece = ids[first : first + size]
        if piece:
            parts += model.logits([piece], [state])
        first += size
    return torch.cat(parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("size", PIECES)
def test_a_prompt_may_be_fed_in_pieces(arm: str, backend: str, size: int):
    model = model_of(arm, backend)
    ids = random_ids(model.config, 70)
    whole = model.logits([ids])[0]
    state = model.new_state()
    pieces = in_pieces(model, ids, [size] * (len(ids) // size), state)
    assert_within(pieces, whole, ANY_SPLIT["fp32"])
    assert state.num_tokens == len(ids)
    assert state.ids == ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
@settings(max_examples=12)
@given(data=st.data())
def test_any_split_of_any_batch_gives_the_same(arm: str, backend: str, data: st.DataObject):
    model = model_of(arm, backend)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5), label="lengths")
    sequences = [random_ids(model.config, n, seed=i) for i, n in enumerate(lengths)]
    alone = [model.logits([ids])[0] for ids in sequences]

    together = model.logits(sequences)
    for one, other in zip(together, alone, strict=True):
        assert_within(one, other, ANY_SPLIT["fp32"])

    # The same again, each sequence cut at a place of its own, in two batched calls.
    cuts = [data.draw(st.integers(0, n), label="cut") for n in lengths]
    states = [model.new_state() for _ in sequences]
    heads = [
        (i, ids[:cut]) for i, (ids, cut) in enumerate(zip(sequences, cuts, strict=True)) if cut
    ]
    tails = [
        (i, ids[cut:])
        for i, (ids, cut) in enumerate(zip(sequences, cuts, strict=True))
        if cut < len(ids)
    ]
    got: list[list[Tensor]] = [[] for _ in sequences]
    for part in (heads, tails):
        if part:
            out = model.logits([ids for _, ids in part], [states[i] for i, _ in part])
            for (i, _), logits in zip(part, out, strict=True):
                got[i].append(logits)
    for pieces, other in zip(got, alone, strict=True):
        assert_within(torch.cat(pieces), other, ANY_SPLIT["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
def test_forks_diverge_without_touching_each_other(arm: str, backend: str):
    model = model_of(arm, backend)
    prompt = random_ids(model.config, 67)
    endings = [random_ids(model.config, 9, seed=seed) for seed in (1, 2, 3)]
    state = model.new_state()
    model.logits([prompt], [state])
    forks = [state.fork() for _ in endings]
    # Interleaved, one token at a time, so that every fork writes after every other.
    got: list[list[Tensor]] = [[] for _ in endings]
    for step in range(9):
        for index, (fork, ending) in enumerate(zip(forks, endings, strict=True)):
            got[index] += model.logits([[ending[step]]], [fork])
    for logits, ending in zip(got, endings, strict=True):
        expected = model.logits([prompt + ending])[0][len(prompt) :]
        assert_within(torch.cat(logits), expected, ANY_SPLIT["fp32"])
    assert state.ids == prompt
    after = model.logits([endings[0]], [state])[0]
    assert_within(after, model.logits([prompt + endings[0]])[0][67:], ANY_SPLIT["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
def test_a_saved_state_goes_on_where_it_stopped(arm: str, backend: str, tmp_path: Path):
    model = model_of(arm, backend)
    ids = random_ids(model.config, 30)
    state = model.new_state()
    model.logits([ids[:19]], [state])
    state.save(tmp_path / "state.safetensors")
    loaded = jamba_lm.load_state(tmp_path / "state.safetensors", model)
    assert loaded.num_tokens == 19
    assert loaded.ids == ids[:19]
    expected = model.logits([ids[19:]], [state])[0]
    torch.testing.assert_close(model.logits([ids[19:]], [loaded])[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_rejected_draft_leaves_no_trace(arm: str, backend: str, kept: int):
    model = model_of(arm, backend)
    prompt, draft = random_ids(model.config, 21), random_ids(model.config, 5, seed=9)
    state = model.new_state()
    model.logits([prompt], [state])
    before = state.snapshot()
    model.logits([draft], [state])
    state.rewind(before)
    assert state.ids == prompt
    follow = [*draft[:kept], *random_ids(model.config, 6, seed=11)]
    got = model.logits([follow], [state])[0]
    assert_within(got, model.logits([prompt + follow])[0][21:], ANY_SPLIT["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
def test_packed_documents_give_the_gradients_of_separate_ones(arm: str, backend: str):
    model = model_of(arm, backend)
    documents = [random_ids(model.config, n, seed=n) for n in (1, 2, 7, 17)]

    def gradients(calls: list[list[list[int]]]) -> dict[str, Tensor]:
        model.decoder.zero_grad()
        for sequences in calls:
            batch = Batch.of([len(ids) for ids in sequences], backend=backend)
            rows = torch.tensor([one for ids in sequences for one in ids])
            (model.decoder(rows, batch).log_softmax(-1)[:, 3].sum() / 10).backward()
        found = {
            name: parameter.grad.clone()
            for name, parameter in model.decoder.named_parameters()
            if parameter.grad is not None
        }
        model.decoder.zero_grad()
        return found

    packed, separate = gradients([documents]), gradients([[one] for one in documents])
    assert packed.keys() == separate.keys()
    for name, gradient in packed.items():
        assert_within(gradient, separate[name], ANY_SPLIT["gradient"], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ["hybrid, dense", "only Mamba", "only attention, rotary"])
def test_gradients_flow_back_through_the_state(arm: str, backend: str):
    model = model_of(arm, backend)
    ids = random_ids(model.config, 12)

    def gradients(sizes: list[int]) -> dict[str, Tensor]:
        model.decoder.zero_grad()
        state = model.new_state()
        total, first = torch.zeros(()), 0
        for size in sizes:
            piece = torch.tensor(ids[first : first + size])
            out = model.decoder(piece, Batch.of([size], [state], backend=backend))
            total = total + out.log_softmax(-1)[:, 5].sum()
            first += size
        total.backward()
        found = {
            n: p.grad.clone() for n, p in model.decoder.named_parameters() if p.grad is not None
        }
        model.decoder.zero_grad()
        return found

    whole, pieces = gradients([12]), gradients([5, 1, 6])
    assert whole.keys() == pieces.keys()
    for name, gradient in pieces.items():
        assert_within(gradient, whole[name], ANY_SPLIT["gradient"], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_pieces_agree_in_bfloat16_to_its_rounding(backend: str, size: int):
    model = shaken_model(ARMS["hybrid, dense"], backend=backend, dtype="bf16")
    ids = random_ids(model.config, 40)
    whole = model.logits([ids])[0]
    pieces = in_pieces(model, ids, [size] * (40 // size), model.new_state())
    assert_within(pieces, whole, ANY_SPLIT["bf16"])


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_empty_prompts_are_refused(sequences: list[list[int]]):
    model = model_of("hybrid with experts", "reference")
    with pytest.raises(InputError, match="at least one"):
        model.logits(sequences)


def test_the_native_backend_agrees_with_the_definition():
    for arm in ARMS:
        ids = random_ids(ARMS[arm], 50)
        native = model_of(arm, "native").logits([ids])[0]
        assert_within(native, model_of(arm, "reference").logits([ids])[0], ANY_SPLIT["fp32"])
