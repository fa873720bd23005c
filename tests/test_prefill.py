"""Prompts read by native calls say what the modules of the decoder say, wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm import prefill as prefill_module
from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels.library import loaded_library
from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.state import SequenceState
from jamba_lm.prefill import prefill
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import quantize_decoder
from jamba_lm.step_plan import StepPlan
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.test_step_plan import (
    PLANNED,
    WIDE,
    assert_same_states,
    by_modules,
    plan_of,
    read_prompts,
)
from tests.tolerances import PREFILL, assert_within

PATHS = loaded_library().paths_here
# Those that differ in what they do with floats.
FLOAT_PATHS = [path for path in PATHS if path not in ("amx", "avx512_bf16")]

# Tiles are of 16 rows, parts of 512; attention takes 128 keys at a time.
LENGTHS = [(17,), (1, 33, 5, 130), (530, 2)]


def read_prompt(plan: StepPlan, *arguments: Any, **options: Any) -> Tensor:
    return torch.from_numpy(prefill(plan, *arguments, **options))


def sequences_of(model: LanguageModel, lengths: tuple[int, ...], *, seed: int) -> list[list[int]]:
    return [random_ids(model.config, n, seed=seed + b) for b, n in enumerate(lengths)]


@pytest.mark.parametrize("path", FLOAT_PATHS)
@pytest.mark.parametrize("arm", PLANNED)
def test_a_prefill_says_what_the_modules_say(arm: str, path: str):
    model = shaken_model(ARMS[arm])
    plan = plan_of(model)
    for lengths in LENGTHS:
        # Some begin, some go on; each is read twice, so that what is remembered is used.
        before = [70 * (b % 2) for b in range(len(lengths))]
        ours, theirs = read_prompts(model, before), read_prompts(model, before)
        for turn in range(2):
            sequences = sequences_of(model, lengths, seed=10 * turn)
            found = read_prompt(plan, sequences, ours, range(sum(lengths)), path=path)
            expected = by_modules(model, sequences, theirs)
            assert_within(found, expected, PREFILL["fp32"], f"{lengths}, turn {turn}")
        for one, other in zip(ours, theirs, strict=True):
            assert_same_states(one, other, PREFILL["fp32"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arm", PLANNED)
def test_a_prefill_in_bfloat16_is_nearer_to_the_exact_than_the_modules(arm: str, path: str):
    # Medians over tokens: now and then a rounding picks another expert, here as there.
    errors: dict[str, list[Tensor]] = {"prefill": [], "modules": []}
    for seed in range(4):
        model = shaken_model(ARMS[arm], dtype="bf16", seed=seed)
        exact = shaken_model(ARMS[arm], dtype="bf16", seed=seed)
        exact.decoder.float()
        plan = plan_of(model)
        sequences = sequences_of(model, (60, 19), seed=seed)
        expected = by_modules(exact, sequences, None)
        for name in errors:
            states = [model.new_state() for _ in sequences]
            if name == "prefill":
                found = read_prompt(plan, sequences, states, range(79), path=path)
            else:
                found = by_modules(model, sequences, states)
            errors[name].append((found - expected).abs().amax(-1))
    ours, modules = (float(torch.cat(errors[name]).median()) for name in ("prefill", "modules"))
    assert ours <= modules, f"median error {ours:.2e} of the prefill, {modules:.2e} of the modules"


@pytest.mark.parametrize("scheme", ["experts-int8", "int8", "experts-int4", "int4"])
@pytest.mark.parametrize("path", FLOAT_PATHS)
def test_a_prefill_of_a_quantised_model_says_what_its_modules_say(scheme: str, path: str):
    config = WIDE.replace(d_ff=192, num_experts=3, dt_rank=16)
    model = shaken_model(config)
    quantize_decoder(model.decoder, find_scheme(scheme))
    plan = plan_of(model)
    reference = LanguageModel(config, model.decoder, backend="reference")
    sequences = sequences_of(model, (40, 9), seed=0)
    ours, theirs = ([reference.new_state() for _ in sequences] for _ in "ab")
    found = read_prompt(plan, sequences, ours, range(49), path=path)
    assert_within(found, by_modules(reference, sequences, theirs), PREFILL["fp32"])


def quantised_errors(
    scheme: str, path: str, rounds: Callable[[PackedLinear], RowRounding]
) -> tuple[float, float]:
    """Return mean errors of a prefill and of the modules, in bfloat16, against float32.

    Args:
        scheme: of the weights.
        path: of the prefill.
        rounds: says how the rows of a matrix may be rounded.
    """
    errors: dict[str, list[Tensor]] = {"prefill": [], "modules": []}
    for seed in range(4):
        config = WIDE.replace(d_ff=192, num_experts=1, dt_rank=16)
        model, exact = (shaken_model(config, dtype="bf16", seed=seed) for _ in "ab")
        for one in (model, exact):
            quantize_decoder(one.decoder, find_scheme(scheme))
        for module in model.decoder.modules():
            if isinstance(module, PackedLinear):
                module.rows8 = rounds(module)
        exact.decoder.float()
        plan = plan_of(model)
        sequences = sequences_of(model, (60, 19), seed=seed)
        wide = LanguageModel(config, exact.decoder, backend="reference")
        expected = by_modules(wide, sequences, None)
        states = [model.new_state() for _ in sequences]
        errors["prefill"].append(
            read_prompt(plan, sequences, states, range(79), path=path) - expected
        )
        modules = LanguageModel(config, model.decoder, backend="reference")
        errors["modules"].append(by_modules(modules, sequences, None) - expected)
    ours, modules_too = (float(torch.cat(errors[name]).abs().mean()) for name in errors)
    return ours, modules_too


@pytest.mark.parametrize("scheme", ["experts-int8", "int8", "experts-int4", "int4"])
@pytest.mark.parametrize("path", PATHS)
def test_a_quantised_prefill_in_bfloat16_is_no_further_off_than_the_modules(scheme: str, path: str):
    ours, modules = quantised_errors(scheme, path, lambda _: RowRounding.NONE)
    assert ours <= 1.05 * modules


# Those that multiply rows of 8 bits by weights of 8 bits, and those that do by 4 as well.
BYTE_PATHS = [path for path in PATHS if path in ("amx", "avx512_bf16", "avx512_vnni")]
NIBBLE_PATHS = [path for path in BYTE_PATHS if path != "amx"]


@pytest.mark.parametrize(
    ("scheme", "path"),
    [("int8", path) for path in BYTE_PATHS] + [("int4", path) for path in NIBBLE_PATHS],
)
def test_a_scheme_lets_rows_be_rounded_to_eight_bits(scheme: str, path: str):
    plain, modules = quantised_errors(scheme, path, lambda _: RowRounding.NONE)
    chosen, _ = quantised_errors(scheme, path, lambda module: module.rows8)
    # Half a unit of 127 is some four times as coarse as bfloat16 at the largest value of a row.
    assert plain < chosen <= 4 * modules
    if scheme == "int8":
        every, _ = quantised_errors(scheme, path, lambda _: RowRounding.BY_ROW)
        assert chosen < every <= 4 * modules


@pytest.mark.parametrize("path", BYTE_PATHS)
def test_the_scheme_of_experts_keeps_rows_as_they_are(path: str):
    kept, modules = quantised_errors("experts-int8", path, lambda module: module.rows8)
    assert kept <= 1.05 * modules


@settings(max_examples=30)
@given(
    length=st.integers(STEP_ROWS + 1, 400),
    cuts=st.lists(st.integers(1, 399), max_size=4),
    dtype=st.sampled_from(["fp32", "bf16"]),
)
def test_where_a_prompt_is_cut_changes_no_bit(length: int, cuts: list[int], dtype: str):
    model = shaken_model(SMALL, dtype=dtype)
    plan = plan_of(model)
    ids = random_ids(model.config, length)
    whole, pieced = model.new_state(), model.new_state()
    expected = read_prompt(plan, [ids], [whole], range(length))
    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    for first, end in pairwise(edges):
        found = read_prompt(plan, [ids[first:end]], [pieced], range(end - first))
        # Logits of few rows are summed as in a step.
        if end - first > STEP_ROWS:
            assert torch.equal(found, expected[first:end])
    assert_same_states(pieced, whole, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_sequence_gives_depends_on_no_other(dtype: str):
    model = shaken_model(SMALL, dtype=dtype)
    plan = plan_of(model)
    lengths = (3, 150, 1, 40)
    sequences = sequences_of(model, lengths, seed=5)
    states = [model.new_state() for _ in lengths]
    together = read_prompt(plan, sequences, states, range(sum(lengths))).split(lengths)
    for ids, logits, state in zip(sequences, together, states, strict=True):
        alone = model.new_state()
        found = read_prompt(plan, [ids], [alone], range(len(ids)))
        assert_same_states(state, alone, 0)
        # Logits of few rows are summed as in a step.
        if len(ids) > STEP_ROWS:
            assert torch.equal(found, logits)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int, path: str):
    model = shaken_model(WIDE.replace(d_ff=300, num_layers=5), dtype="bf16")
    plan = plan_of(model)
    sequences = sequences_of(model, (90, 200), seed=1)
    before = torch.get_num_threads()
    found, states = [], []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            states.append([model.new_state() for _ in sequences])
            found.append(read_prompt(plan, sequences, states[-1], range(290), path=path))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for one, other in zip(*states, strict=True):
        assert_same_states(one, other, 0)


def test_a_long_prompt_is_read_in_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    model = shaken_model(SMALL)
    plan = plan_of(model)
    lengths = (300, 5, 700)
    sequences = sequences_of(model, lengths, seed=2)
    wanted = [299, 0, 1004, 300, 640]
    whole = [model.new_state() for _ in lengths]
    expected = read_prompt(plan, sequences, whole, wanted)
    sizes: list[int] = []
    run = prefill_module.run_prefill

    def counted(model: object, ids: list[int], *rest: object, **options: object) -> Floats:
        sizes.append(len(ids))
        return run(model, ids, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prefill_module, "run_prefill", counted)
    monkeypatch.setattr(prefill_module, "CALL_ROWS", 256)
    pieced = [model.new_state() for _ in lengths]
    assert torch.equal(read_prompt(plan, sequences, pieced, wanted), expected)
    assert sizes == [256, 256, 256, 237]
    for one, other in zip(pieced, whole, strict=True):
        assert_same_states(one, other, 0)


def test_a_call_that_fails_leaves_every_state_where_it_was(monkeypatch: pytest.MonkeyPatch):
    model = shaken_model(SMALL)
    plan = plan_of(model)
    states = read_prompts(model, [40, 3])
    before: list[SequenceState] = [state.fork() for state in states]
    monkeypatch.setattr(prefill_module, "CALL_ROWS", 64)
    run = prefill_module.run_prefill
    calls: list[int] = []

    def failing(*arguments: object, **options: object) -> Floats:
        calls.append(1)
        if len(calls) == 3:
            raise BackendUnavailable("the third call fails")
        return run(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prefill_module, "run_prefill", failing)
    with pytest.raises(BackendUnavailable, match="third"):
        read_prompt(plan, sequences_of(model, (150, 90), seed=3), states, [239])
    for one, other in zip(states, before, strict=True):
        assert_same_states(one, other, 0)


def test_an_activation_that_is_not_finite_is_not_hidden():
    model = shaken_model(SMALL)
    with torch.no_grad():
        model.decoder.blocks[0].mixer_norm.weight[3] = float("inf")
    assert not model.next_logits([[1] * 40], [model.new_state()]).isfinite().any()


@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_a_row_that_is_not_finite_spoils_no_other_sequence(experts_per_token: int):
    model = shaken_model(SMALL.replace(experts_per_token=experts_per_token))
    sequences = [[3] * 20, [5] * 20, [4] * 20]
    clean = read_prompt(plan_of(model), sequences, [model.new_state() for _ in "abc"], range(60))
    with torch.no_grad():
        model.decoder.embedding.weight[5] = torch.nan
    found = read_prompt(plan_of(model), sequences, [model.new_state() for _ in "abc"], range(60))
    assert torch.equal(found[:20], clean[:20])
    assert torch.equal(found[40:], clean[40:])
    assert not found[20:40].isfinite().any()


def test_prompts_go_to_the_native_code_and_modules_that_it_does_not_know_stay_with_torch():
    seen: list[str] = []
    for arm, config in ARMS.items():
        model = shaken_model(config)
        model.decoder.register_forward_pre_hook(lambda *_, arm=arm: seen.append(arm))
        model.next_logits([[1] * 40], [model.new_state()])
        model.logits([[1] * 40])
    assert set(seen) == set(ARMS) - set(PLANNED)
