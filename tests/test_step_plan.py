"""A step in one native call says what the modules of the decoder say, in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.language_model import LanguageModel, from_config
from jamba_lm.model.batch import Batch
from jamba_lm.model.state import KeyValueState, SequenceState
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import quantize_decoder
from jamba_lm.step_plan import StepPlan, why_not_plan
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.tolerances import STEP, assert_within

PATHS = loaded_library().paths_here
PLANNED = [arm for arm, config in ARMS.items() if config.position == "none"]
WIDE = SMALL.replace(d_model=64, d_ff=128, d_head=20, num_heads=8, dt_rank=None, state_size=24)


def plan_of(model: LanguageModel) -> StepPlan:
    assert why_not_plan(model.decoder, model.backend) is None
    return StepPlan(model.config, model.decoder)


def by_modules(
    model: LanguageModel, sequences: list[list[int]], states: list[SequenceState] | None
) -> Tensor:
    ids = torch.tensor([one for sequence in sequences for one in sequence])
    batch = Batch.of([len(sequence) for sequence in sequences], states)
    with torch.no_grad():
        return model.decoder(ids, batch)


def read_prompts(model: LanguageModel, lengths: list[int]) -> list[SequenceState]:
    states = [model.new_state() for _ in lengths]
    for index, (length, state) in enumerate(zip(lengths, states, strict=True)):
        if length:
            by_modules(model, [random_ids(model.config, length, seed=index)], [state])
    return states


def assert_same_states(found: SequenceState, expected: SequenceState, tolerance: float) -> None:
    assert found.ids == expected.ids
    for index, (one, other) in enumerate(zip(found.layers, expected.layers, strict=True)):
        for name, tensor in other.tensors().items():
            what = f"{name} of layer {index}"
            assert_within(one.tensors()[name], tensor, tolerance, what)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arm", PLANNED)
def test_a_step_says_what_the_modules_say(arm: str, path: str):
    model = shaken_model(ARMS[arm])
    plan = plan_of(model)
    # The last has more keys than one piece of attention takes.
    lengths = [0, 70, 3, 600]
    ours, theirs = read_prompts(model, lengths), read_prompts(model, lengths)
    for turn, counts in enumerate([(1, 1, 1, 1), (5, 1, 7, 3), (1, 13, 1, 1)]):
        sequences = [
            random_ids(model.config, count, seed=100 * turn + b) for b, count in enumerate(counts)
        ]
        found = plan.run(sequences, ours, range(sum(counts)), path=path)
        expected = by_modules(model, sequences, theirs)
        assert_within(found, expected, STEP["fp32"], f"turn {turn}")
        for one, other in zip(ours, theirs, strict=True):
            assert_same_states(one, other, STEP["fp32"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arm", PLANNED)
def test_a_step_in_bfloat16_is_nearer_to_the_exact_than_the_modules(arm: str, path: str):
    # Medians over tokens: now and then a rounding picks another expert, here as there.
    errors: dict[str, list[Tensor]] = {"step": [], "modules": []}
    for seed in range(6):
        model = shaken_model(ARMS[arm], dtype="bf16", seed=seed)
        exact = shaken_model(ARMS[arm], dtype="bf16", seed=seed)
        exact.decoder.float()
        plan = plan_of(model)
        prompts = [random_ids(model.config, n, seed=seed) for n in (40, 9)]
        tails = [random_ids(model.config, n, seed=seed + 50) for n in (9, 7)]
        expected = by_modules(exact, [p + t for p, t in zip(prompts, tails, strict=True)], None)
        expected = torch.cat([expected[40:49], expected[58:65]])
        for name in errors:
            states = [model.new_state() for _ in prompts]
            by_modules(model, prompts, states)
            if name == "step":
                found = plan.run(tails, states, range(16), path=path)
            else:
                found = by_modules(model, tails, states)
            errors[name].append((found - expected).abs().amax(-1))
    step, modules = (float(torch.cat(errors[name]).median()) for name in ("step", "modules"))
    assert step <= modules, f"median error {step:.2e} of the step, {modules:.2e} of the modules"


@pytest.mark.parametrize("scheme", ["experts-int8", "int8", "int4"])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_a_quantised_model_says_what_its_modules_say(scheme: str, path: str):
    config = WIDE.replace(d_ff=192, num_experts=3, dt_rank=16)
    model = shaken_model(config)
    quantize_decoder(model.decoder, find_scheme(scheme))
    # Modules told to use the definition, which does not round the inputs of packed matrices.
    reference = LanguageModel(config, model.decoder, backend="reference")
    plan = plan_of(LanguageModel(config, model.decoder, backend=None))
    sequences = [random_ids(config, 6), random_ids(config, 9, seed=1)]
    ours, theirs = ([reference.new_state() for _ in sequences] for _ in "ab")
    found = plan.run(sequences, ours, range(15), path=path)
    assert_within(found, by_modules(reference, sequences, theirs), STEP["packed"])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int):
    model = from_config(WIDE.replace(vocab_size=5000, d_ff=700, num_layers=5), seed=3)
    plan = plan_of(model)
    sequences = [random_ids(model.config, 3), random_ids(model.config, 2)]
    prompts = read_prompts(model, [600, 9])
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            states = [state.fork() for state in prompts]
            results.append(plan.run(sequences, states, range(5)))
            results.append(states[0].layers[0].tensors()["scan"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    dtype=st.sampled_from(["fp32", "bf16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_a_row_gives_depends_on_no_other_row(counts: list[int], dtype: str, seed: int):
    counts = counts[: max(1, len(counts))]
    while sum(counts) > STEP_ROWS:
        counts.pop()
    model = shaken_model(SMALL, dtype=dtype)
    plan = plan_of(model)
    lengths = [(seed + 7 * b) % 90 for b in range(len(counts))]
    sequences = [random_ids(model.config, n, seed=seed % 1000 + b) for b, n in enumerate(counts)]
    together = plan.run(sequences, read_prompts(model, lengths), range(sum(counts)))
    alone = []
    for ids, state in zip(sequences, read_prompts(model, lengths), strict=True):
        alone += [plan.run([[one]], [state], [0]) for one in ids]
    assert torch.equal(together, torch.cat(alone))


def test_only_the_rows_asked_for_are_answered():
    model = shaken_model(SMALL)
    plan = plan_of(model)
    ids = random_ids(model.config, 6)
    every = plan.run([ids], [model.new_state()], range(6))
    some = plan.run([ids], [model.new_state()], [4, 1])
    assert torch.equal(some, every[[4, 1]])


def test_a_fork_is_not_moved_by_a_step_of_the_other():
    model = shaken_model(SMALL)
    ids = random_ids(model.config, 80)
    state = model.new_state()
    model.logits([ids], [state])
    fork, snapshot = state.fork(), state.snapshot()
    first = model.next_logits([[5]], [state])
    model.next_logits([[6, 7]], [fork])
    assert fork.num_tokens == 82
    state.rewind(snapshot)
    assert torch.equal(model.next_logits([[5]], [state]), first)


def test_a_token_that_is_refused_leaves_the_state_where_it_was():
    model = shaken_model(SMALL)
    state = model.new_state()
    model.next_logits([[1, 2, 3]], [state])
    kept = [layer.tensors() for layer in state.layers]
    with pytest.raises(Exception, match="token id 97 is out of range"):
        model.next_logits([[4, 97]], [state])
    assert state.ids == [1, 2, 3]
    for layer, before in zip(state.layers, kept, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, before[name])


def test_reserved_rows_lie_side_by_side_in_one_block():
    layer = KeyValueState(2, 4, torch.float32)
    layer.append(torch.ones(62, 2, 4), torch.ones(62, 2, 4))
    layer.reserve(5)
    assert layer.num_tokens == 67
    assert [len(block) for block in layer.key_blocks()] == [62, 5]
    layer.key_blocks()[-1].fill_(2)
    layer.reserve(1)
    assert torch.cat(layer.key_blocks())[:67].sum() == 62 * 8 + 5 * 16


def test_few_rows_of_a_model_go_through_the_step_and_many_through_the_modules():
    model = shaken_model(SMALL)
    assert model.why_not_step() is None
    calls = []
    model.decoder.register_forward_pre_hook(lambda *_: calls.append("modules"))
    model.next_logits([[1] * STEP_ROWS], [model.new_state()])
    assert not calls
    model.next_logits([[1] * (STEP_ROWS + 1)], [model.new_state()])
    assert calls == ["modules"]


@pytest.mark.parametrize(
    ("arm", "changes", "reason"),
    [
        ("hybrid, rotary", {}, "a native step has no rotary positions"),
        ("hybrid, dense", {"backend": "reference"}, "the native back-end does not serve"),
        ("hybrid, dense", {"dtype": "fp16"}, "activations are torch.float16"),
    ],
)
def test_a_model_that_has_no_step_says_why_and_runs(arm: str, changes: dict, reason: str):
    model = shaken_model(ARMS[arm], **changes)
    assert reason in str(model.why_not_step())
    assert model.next_logits([[1, 2]], [model.new_state()]).isfinite().all()


@pytest.mark.parametrize("name", ["final_norm.weight", "blocks.0.mixer.log_decay_CN"])
def test_a_weight_that_was_changed_is_not_remembered_as_it_was(name: str):
    model = shaken_model(SMALL)
    before = model.next_logits([[1, 2]], [model.new_state()])
    with torch.no_grad():
        model.decoder.get_parameter(name).mul_(1.5)
    after = model.next_logits([[1, 2]], [model.new_state()])
    assert not torch.equal(after, before)
    assert_within(after, by_modules(model, [[1, 2]], [model.new_state()])[1:], STEP["fp32"])


def test_weights_that_were_moved_to_another_type_are_read_where_they_are():
    model = shaken_model(SMALL)
    model.next_logits([[1, 2]], [model.new_state()])
    model.decoder.to(torch.bfloat16)
    found = model.next_logits([[1, 2]], [model.new_state()])
    assert_within(found, by_modules(model, [[1, 2]], [model.new_state()])[1:], STEP["bf16"])


def test_an_activation_that_is_not_finite_is_not_hidden():
    model = from_config(WIDE.replace(d_ff=192, num_experts=1, dt_rank=16), seed=1)
    quantize_decoder(model.decoder, find_scheme("int8"))
    with torch.no_grad():
        model.decoder.blocks[0].mixer_norm.weight[3] = float("inf")
    assert not model.next_logits([[1]], [model.new_state()]).isfinite().any()
