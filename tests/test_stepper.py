"""A stepper says what single calls say, whatever happens to its states in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.errors import BackendUnavailable, InputError
from jamba_lm.kernels.library import Library
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.state import MambaState, SequenceState
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import quantize_decoder
from jamba_lm.stepper import CALLS_BETWEEN_CHECKS, Stepper
from tests.arms import ARMS, SMALL, random_ids, shaken_model

PLANNED = [arm for arm, config in ARMS.items() if config.position == "none"]


def last_rows(stepper: Stepper, sequences: list[list[int]], states: list[SequenceState]):
    found = stepper.read(sequences, [1] * len(sequences), states)
    return torch.from_numpy(np.concatenate(list(found)))


def assert_same(found: SequenceState, expected: SequenceState) -> None:
    assert found.ids == expected.ids
    for one, other in zip(found.layers, expected.layers, strict=True):
        for name, tensor in other.tensors().items():
            assert torch.equal(one.tensors()[name], tensor), name


@pytest.mark.parametrize("arm", ARMS)
def test_a_stepper_says_what_calls_of_their_own_say(arm: str):
    model = shaken_model(ARMS[arm])
    stepper = Stepper(model)
    # Of three sequences one comes late and one leaves early; the first reads several tokens once.
    ours, theirs = ([model.new_state() for _ in range(3)] for _ in "ab")
    for turn in range(130):
        who = [b for b in range(3) if (b != 1 or turn > 3) and (b != 2 or turn < 70)]
        sequences = [random_ids(SMALL, 1 + 6 * (turn == 5 and b == 0), seed=turn) for b in who]
        found = last_rows(stepper, sequences, [ours[b] for b in who])
        expected = model.next_logits(sequences, [theirs[b] for b in who])
        assert torch.equal(found, expected), f"turn {turn}"
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def test_rows_are_given_for_the_last_tokens_of_each():
    model = shaken_model(SMALL)
    sequences = [random_ids(SMALL, 5), random_ids(SMALL, 2)]
    states = [model.new_state() for _ in sequences]
    expected = model.last_logits(sequences, [3, 1], [model.new_state() for _ in sequences])
    found = Stepper(model).read(sequences, [3, 1], states)
    assert [len(rows) for rows in found] == [3, 1]
    for rows, logits in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(np.stack(rows)), logits)


def test_many_rows_are_read_as_the_model_reads_them():
    model = shaken_model(SMALL)
    ids = random_ids(SMALL, STEP_ROWS + 1)
    ours, theirs = model.new_state(), model.new_state()
    found = last_rows(Stepper(model), [ids], [ours])
    assert torch.equal(found, model.next_logits([ids], [theirs]))
    assert_same(ours, theirs)


DEEDS = ["step", "step", "step", "fork", "snapshot", "rewind", "others", "swap", "save", "draft"]


@settings(max_examples=60)
@given(deeds=st.lists(st.sampled_from(DEEDS), min_size=4, max_size=40), seed=st.integers(0, 99))
def test_whatever_is_done_to_a_state_between_steps_nothing_else_is_moved(
    deeds: list[str], seed: int
):
    model = shaken_model(SMALL)
    stepper = Stepper(model)
    state, kept = model.new_state(), []
    twin = model.new_state()
    snapshots = []
    for turn, deed in enumerate(deeds):
        ids = random_ids(SMALL, 1, seed=seed + turn)
        if deed == "step":
            assert torch.equal(last_rows(stepper, [ids], [state]), model.next_logits([ids], [twin]))
        elif deed == "others":
            model.next_logits([ids], [state])
            model.next_logits([ids], [twin])
        elif deed == "fork":
            kept.append((state.fork(), twin.fork()))
        elif deed == "snapshot":
            snapshots.append((state.snapshot(), twin.snapshot()))
        elif deed == "rewind" and snapshots:
            ours, theirs = snapshots.pop()
            state.rewind(ours)
            twin.rewind(theirs)
        elif deed == "swap" and kept:
            (state, twin), kept[-1] = kept[-1], (state, twin)
        elif deed == "save":
            tensors = [layer.tensors() for layer in state.layers]
            copies = [{name: x.clone() for name, x in one.items()} for one in tensors]
            for _ in range(3):
                last_rows(stepper, [ids], [state])
                model.next_logits([ids], [twin])
            for one, copy in zip(tensors, copies, strict=True):
                assert all(torch.equal(one[name], copy[name]) for name in copy)
        elif deed == "draft":
            ahead, twin_ahead = state.fork(), twin.fork()
            last_rows(stepper, [[*ids, 7, 8]], [ahead])
            model.next_logits([[*ids, 7, 8]], [twin_ahead])
            if turn % 2:
                state.take_over(ahead)
                twin.take_over(twin_ahead)
            else:
                state.discard(ahead)
                twin.discard(twin_ahead)
    for one, other in [(state, twin), *kept]:
        assert_same(one, other)


def test_a_state_is_moved_in_two_places_in_turn():
    model = shaken_model(SMALL)
    state, stepper = model.new_state(), Stepper(model)
    places = []
    for _ in range(8):
        last_rows(stepper, [[5]], [state])
        places.append(
            [one.scan_CN.data_ptr() for one in state.layers if isinstance(one, MambaState)]
        )
    assert places[2:] == places[:2] * 3
    assert places[0] != places[1]


def test_a_step_that_is_refused_moves_nothing(monkeypatch: pytest.MonkeyPatch):
    model = shaken_model(SMALL)
    stepper = Stepper(model)
    states = [model.new_state(), model.new_state()]
    sequences = [random_ids(SMALL, 3), random_ids(SMALL, 60, seed=1)]
    model.next_logits(sequences, states)
    last_rows(stepper, [[1], [2]], states)
    twins = [state.fork() for state in states]

    def refuse(self: Library, function: str, arguments: object) -> None:
        raise BackendUnavailable("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Library, "call", refuse)
        with pytest.raises(BackendUnavailable):
            # The second needs a block more for this.
            last_rows(stepper, [[3], [4] * 5], states)
    for state, twin in zip(states, twins, strict=True):
        assert_same(state, twin)
    found = last_rows(stepper, [[6], [7]], states)
    assert torch.equal(found, model.next_logits([[6], [7]], twins))
    for state, twin in zip(states, twins, strict=True):
        assert_same(state, twin)


CHANGES: dict[str, Callable[[LanguageModel], object]] = {
    "in place": lambda model: (
        model.decoder.final_norm.weight.data.mul_(1) is None
        or model.decoder.final_norm.weight.mul_(1.5)
    ),
    "of type": lambda model: model.decoder.to(torch.bfloat16),
    "of a parameter": lambda model: setattr(
        model.decoder.blocks[0].mixer, "skip_C", torch.nn.Parameter(torch.ones(SMALL.d_inner) * 9)
    ),
    "by quantisation": lambda model: quantize_decoder(model.decoder, find_scheme("int8")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_noticed(change: str):
    model = shaken_model(SMALL)
    before = Stepper(model)
    first = last_rows(before, [[1, 2]], [model.new_state()])
    with torch.no_grad():
        CHANGES[change](model)
    expected = model.next_logits([[1, 2]], [model.new_state()])
    assert not torch.equal(expected, first)
    assert torch.equal(last_rows(Stepper(model), [[1, 2]], [model.new_state()]), expected)
    # A new sequence is reason to look at once.
    assert torch.equal(last_rows(before, [[1, 2]], [model.new_state()]), expected)


def test_a_change_of_the_weights_is_noticed_in_the_middle_of_a_sequence():
    model = shaken_model(SMALL)
    stepper, state, twin = Stepper(model), model.new_state(), model.new_state()
    for turn in range(2 + CALLS_BETWEEN_CHECKS):
        found = last_rows(stepper, [[1]], [state])
        expected = model.next_logits([[1]], [twin])
        if turn == 1:
            with torch.no_grad():
                # What states remember does not depend on it.
                model.decoder.final_norm.weight.mul_(1.5)
    assert torch.equal(found, expected)


def test_a_state_of_another_model_is_refused():
    model = shaken_model(SMALL)
    narrow = shaken_model(SMALL.replace(d_model=16)).new_state()
    half = shaken_model(SMALL, dtype="bf16").new_state()
    for state in (narrow, half):
        with pytest.raises(InputError, match="state 1 was made for a model of other sizes"):
            last_rows(Stepper(model), [[1], [2]], [model.new_state(), state])
        with pytest.raises(InputError, match="state 1 was made for a model of other sizes"):
            model.next_logits([[1], [2]], [model.new_state(), state])
