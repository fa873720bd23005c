"""A step in one native call says what the modules of the decoder say, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.kernels.packed_weights import Int8Weight
from jamba_lm.language_model import LanguageModel, from_config
from jamba_lm.model.batch import Batch
from jamba_lm.model.moe import MoE
from jamba_lm.model.state import KeyValueState, SequenceState
from jamba_lm.prefill import prefill
from jamba_lm.quantization.grid import quantize_int4
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import place_packed, quantize_decoder
from jamba_lm.step_plan import StepPlan, why_not_plan
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.tolerances import STEP, assert_within

PATHS = loaded_library().paths_here
PLANNED = [arm for arm, config in ARMS.items() if config.position == "none"]
WIDE = SMALL.replace(d_model=64, d_ff=128, d_head=20, num_heads=8, dt_rank=None, state_size=24)


def plan_of(model: LanguageModel) -> StepPlan:
    assert why_not_plan(model.decoder, model.backend) is None
    return StepPlan(model.config, model.decoder)


def run(plan: StepPlan, *arguments: Any, **options: Any) -> Tensor:
    return torch.from_numpy(plan.run(*arguments, **options))


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
        found = run(plan, sequences, ours, range(sum(counts)), path=path)
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
                found = run(plan, tails, states, range(16), path=path)
            else:
                found = by_modules(model, tails, states)
            errors[name].append((found - expected).abs().amax(-1))
    step, modules = (float(torch.cat(errors[name]).median()) for name in ("step", "modules"))
    assert step <= modules, f"median error {step:.2e} of the step, {modules:.2e} of the modules"


@pytest.mark.parametrize("scheme", ["experts-int8", "int8", "experts-int4", "int4"])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_a_quantised_model_says_what_its_modules_say(scheme: str, path: str):
    config = WIDE.replace(d_ff=192, num_experts=3, dt_rank=16)
    model = shaken_model(config)
    quantize_decoder(model.decoder, find_scheme(scheme))
    plan = plan_of(model)
    # The last one to hold a decoder says what its modules use: the definition, from here on.
    reference = LanguageModel(config, model.decoder, backend="reference")
    sequences = [random_ids(config, 6), random_ids(config, 9, seed=1)]
    ours, theirs = ([reference.new_state() for _ in sequences] for _ in "ab")
    found = run(plan, sequences, ours, range(15), path=path)
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
            results.append(run(plan, sequences, states, range(5)))
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
    together = run(plan, sequences, read_prompts(model, lengths), range(sum(counts)))
    alone = []
    for ids, state in zip(sequences, read_prompts(model, lengths), strict=True):
        alone += [run(plan, [[one]], [state], [0]) for one in ids]
    assert torch.equal(together, torch.cat(alone))


def test_only_the_rows_asked_for_are_answered():
    model = shaken_model(SMALL)
    plan = plan_of(model)
    ids = random_ids(model.config, 6)
    every = run(plan, [ids], [model.new_state()], range(6))
    some = run(plan, [ids], [model.new_state()], [4, 1])
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
    with pytest.raises(Exception, match="token id 1 is 97, which is out of range"):
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


# Heads that share keys in threes, sevens and alone; widths that fill no vector, and more than two.
HEADS = [(3, 1, 48), (7, 1, 20), (4, 4, 33), (10, 2, 80)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "groups", "width"), HEADS)
def test_heads_of_any_number_and_width_attend(heads: int, groups: int, width: int, path: str):
    config = SMALL.replace(num_heads=heads, num_kv_heads=groups, d_head=width)
    model = shaken_model(config)
    lengths, tails = [601, 14], [[1, 2, 3, 4], [5]]
    ours, theirs = read_prompts(model, lengths), read_prompts(model, lengths)
    found = run(plan_of(model), tails, ours, range(5), path=path)
    assert_within(found, by_modules(model, tails, theirs), STEP["fp32"], "float32")

    model = shaken_model(config, dtype="bf16")
    exact = shaken_model(config, dtype="bf16")
    exact.decoder.float()
    prompt = random_ids(config, 530, seed=3)
    states = [model.new_state(), model.new_state()]
    plan = plan_of(model)
    for state in states:
        by_modules(model, [prompt[:520]], [state])
    step = run(plan, [prompt[520:]], states[:1], range(10), path=path)
    modules = by_modules(model, [prompt[520:]], states[1:])
    expected = by_modules(exact, [prompt], None)[520:]
    error, theirs_error = (float((x - expected).abs().median()) for x in (step, modules))
    assert error <= 1.25 * theirs_error, f"{error:.2e}, modules {theirs_error:.2e}"


@pytest.mark.parametrize("path", PATHS)
def test_scores_of_two_pieces_of_keys_may_lie_far_apart(path: str):
    # By hundreds, where exp of the difference is beyond float32.
    model = shaken_model(SMALL)
    with torch.no_grad():
        model.decoder.get_parameter("blocks.2.mixer.q_proj.weight").mul_(1000)
    (state,) = read_prompts(model, [700])
    logits = run(plan_of(model), [[1, 2, 3, 4]], [state], range(4), path=path)
    assert logits.isfinite().all()


@pytest.mark.parametrize("arm", ["hybrid with experts", "no inner norms"])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_adds_the_models_own_epsilon_in_every_norm(arm: str, path: str):
    # Of the size of what is squared: one norm without it, or with another one, shows.
    model = shaken_model(ARMS[arm].replace(norm_eps=0.5))
    ids = random_ids(model.config, 9)
    found = run(plan_of(model), [ids], [model.new_state()], range(9), path=path)
    assert_within(found, by_modules(model, [ids], [model.new_state()]), STEP["fp32"])


@pytest.mark.parametrize("path", PATHS)
def test_of_equal_experts_the_first_are_chosen(path: str):
    model = shaken_model(SMALL)
    with torch.no_grad():
        for block in model.decoder.blocks:
            if isinstance(block.feed_forward, MoE):
                block.feed_forward.router.weight.zero_()
                for expert in block.feed_forward.experts[SMALL.experts_per_token :]:
                    expert.down_proj.weight.fill_(torch.nan)
    logits = run(plan_of(model), [[1, 2, 3]], [model.new_state()], range(3), path=path)
    assert logits.isfinite().all()


@pytest.mark.parametrize("rows", [3, STEP_ROWS + 4])
@pytest.mark.parametrize("path", PATHS)
def test_the_rows_of_a_router_are_not_rounded(path: str, rows: int):
    config = SMALL.replace(
        num_layers=1, attention_period=5, attention_offset=4, expert_period=1, expert_offset=0
    )
    model, exact = (shaken_model(config, dtype="bf16") for _ in "ab")
    exact.decoder.float()
    token = 5
    for one in (model, exact):
        with torch.no_grad():
            one.decoder.blocks[0].mixer.out_proj.weight.zero_()
    with torch.no_grad():
        # The row that the router meets, and scores that see little of it but what rounding adds.
        norm = exact.decoder.blocks[0].feed_forward_norm
        row = norm(exact.decoder.embedding.weight[token : token + 1], Batch.of([1], None))[0]
        added = row.bfloat16().float() - row
        seen = added - (added @ row) / (row @ row) * row
        router = torch.zeros_like(model.decoder.blocks[0].feed_forward.router.weight)
        router[0] = 4 * seen / (seen @ seen)
        router[2:] = -20 * row / (row @ row)
        for one in (model, exact):
            one.decoder.blocks[0].feed_forward.router.weight.copy_(router)
    call = (plan_of(model), [[token] * rows], [model.new_state()], range(rows))
    if rows <= STEP_ROWS:
        found = run(*call, path=path)
    else:
        found = torch.from_numpy(prefill(*call, path=path))
    assert_within(found, by_modules(exact, [[token] * rows], None), 0.01)


@pytest.mark.parametrize(
    ("counts", "rows", "reason"),
    [
        ([9, 8], [0], "a size is out of range"),
        ([3], [0, 1, 2, 0], "a size is out of range"),
        ([3], [], "a size is out of range"),
        ([2, 0, 1], [0], "offsets must rise strictly"),
    ],
)
def test_the_library_refuses_a_step_it_has_no_room_for(
    counts: list[int], rows: list[int], reason: str
):
    model = shaken_model(SMALL)
    plan = plan_of(model)
    sequences = [[1] * count for count in counts]
    with pytest.raises(BackendUnavailable, match=f"jamba_step: {reason}"):
        run(plan, sequences, [model.new_state() for _ in counts], rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "final_norm.weight",
        "blocks.0.mixer.log_decay_CN",
        "blocks.0.mixer.conv_CW",
        "blocks.0.mixer.skip_C",
    ],
)
def test_a_weight_that_was_changed_is_not_remembered_as_it_was(name: str, dtype: str):
    # In bfloat16 the plan holds copies of all vectors, in float32 of some.
    model = shaken_model(SMALL, dtype=dtype)
    before = model.next_logits([[1, 2]], [model.new_state()])
    with torch.no_grad():
        model.decoder.get_parameter(name).mul_(1.5)
    after = model.next_logits([[1, 2]], [model.new_state()])
    assert not torch.equal(after, before)
    assert_within(after, by_modules(model, [[1, 2]], [model.new_state()])[1:], STEP[dtype])


def test_weights_made_in_inference_mode_may_be_stepped():
    with torch.inference_mode():
        model = shaken_model(SMALL)
    assert model.why_not_step() is None
    found = model.next_logits([[1, 2]], [model.new_state()])
    assert torch.equal(found, model.next_logits([[1, 2]], [model.new_state()]))
    assert_within(found, by_modules(model, [[1, 2]], [model.new_state()])[1:], STEP["fp32"])


def test_a_matrix_that_is_not_contiguous_is_left_to_its_module():
    model = shaken_model(SMALL)
    before = model.next_logits([[1, 2]], [model.new_state()])
    weight = model.decoder.get_parameter("blocks.0.mixer.in_proj.weight")
    weight.data = weight.data.t().contiguous().t()
    assert model.why_not_step() == "a matrix is not contiguous"
    assert_within(model.next_logits([[1, 2]], [model.new_state()]), before, STEP["fp32"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks.0.feed_forward.up_proj": 8}, "gates and up-projections"),
        ({"blocks.1.feed_forward.experts.2.gate_proj": 8}, "gates and up-projections"),
        ({"blocks.3.feed_forward.experts.1.down_proj": 8}, "down-projections"),
        ({"blocks.2.mixer.k_proj": 8}, "queries, keys and values"),
        (
            {"blocks.0.feed_forward.gate_proj": 32, "blocks.0.feed_forward.up_proj": 64},
            "gates and up-projections",
        ),
    ],
)
def test_matrices_of_two_types_that_meet_the_same_rows_are_left_to_their_modules(
    changes: dict[str, int], reason: str
):
    model = shaken_model(WIDE)
    before = model.next_logits([[1, 2]], [model.new_state()])
    for name, kind in changes.items():
        matrix = model.decoder.get_parameter(f"{name}.weight").detach()
        packed = Int8Weight.quantize(matrix) if kind == 8 else quantize_int4(matrix, kind)
        place_packed(model.decoder, f"{name}.weight", packed, matrix.dtype, rows8=RowRounding.NONE)
    model = LanguageModel(WIDE, model.decoder)
    assert reason in str(model.why_not_step())
    after = model.next_logits([[1, 2]], [model.new_state()])
    assert after.isfinite().all()
    assert not torch.equal(after, before)


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


@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path: str, experts_per_token: int):
    model = shaken_model(SMALL.replace(experts_per_token=experts_per_token))
    ids = [[3], [5], [4]]
    clean = run(plan_of(model), ids, [model.new_state() for _ in ids], range(3), path=path)
    with torch.no_grad():
        model.decoder.embedding.weight[5] = torch.nan
    found = run(plan_of(model), ids, [model.new_state() for _ in ids], range(3), path=path)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not found[1].isfinite().any()
    alone = run(plan_of(model), [[5]], [model.new_state()], [0], path=path)
    assert not alone.isfinite().any()
