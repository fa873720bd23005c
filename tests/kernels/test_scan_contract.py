"""What every back-end, on every instruction set, owes for the selective scan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.scan_cases import (
    DTYPES,
    NAMES,
    PATHS,
    RUNNERS,
    ScanInputs,
    Slopes,
    definition,
    run_both_ways,
    scan,
    scan_inputs,
    slopes_of,
)
from tests.tolerances import SCAN, assert_within

# Lengths around the borders of chunks (16, 32), of the kernel for few tokens (8) and of vectors;
# channels and states that fill vectors, leave tails, or are fewer than a vector.
SHAPES = [
    ([1], 1, 1),
    ([3], 16, 16),
    ([8], 20, 16),
    ([7, 1, 70], 37, 16),
    ([33], 5, 5),
    ([63, 64, 65], 100, 3),
    ([130], 48, 24),
    ([15, 16, 17], 300, 8),
]


def assert_all_within(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        tolerance = SCAN["gradient"] if name.startswith("gradient") else SCAN["value"]
        if found[name].dtype is torch.bfloat16:
            tolerance = SCAN["bf16"]
        assert_within(found[name], x, tolerance, name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_values_and_gradients_are_those_of_the_definition(
    runner: str, shape: tuple[list[int], int, int], dtype: str
):
    inputs = scan_inputs(*shape, dtype)
    slopes = slopes_of(inputs)
    found = run_both_ways(scan(runner), inputs, slopes)
    assert found["y"].dtype == inputs.u.dtype
    assert found["last_state"].dtype == torch.float32
    for name in NAMES:
        assert found[f"gradient of {name}"].dtype == getattr(inputs, name).dtype
    assert_all_within(found, definition(inputs, slopes), dtype)


@pytest.mark.parametrize("others", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["u", "dt", "dt_bias", "B", "C", "skip"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_each_input_may_be_of_either_type(runner: str, name: str, others: str):
    one = DTYPES["bf16" if others == "fp32" else "fp32"]
    inputs = scan_inputs([3, 20], channels=20)
    types = dict.fromkeys(("u", "dt", "dt_bias", "B", "C", "skip"), DTYPES[others])
    types[name] = one
    inputs = replace(inputs, **{x: getattr(inputs, x).to(dtype) for x, dtype in types.items()})
    slopes = slopes_of(inputs)
    expected = definition(inputs, slopes)
    found = run_both_ways(scan(runner), inputs, slopes)
    assert_all_within(found, expected, others)
    y, _ = scan(runner)(*inputs.arguments)
    assert_within(y, expected["y"], SCAN["bf16" if y.dtype is torch.bfloat16 else "value"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_no_gradient_gives_the_same_values(runner: str, shape: tuple[list[int], int, int]):
    inputs = scan_inputs(*shape)
    slopes = slopes_of(inputs)
    y, last_state = scan(runner)(*inputs.arguments)
    expected = definition(inputs, slopes)
    assert not y.requires_grad
    assert not last_state.requires_grad
    assert_within(y, expected["y"], SCAN["value"])
    assert_within(last_state, expected["last_state"], SCAN["value"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_state_means_zeros(runner: str):
    inputs = scan_inputs([5, 40], with_state=False)
    zeros = replace(inputs, state=torch.zeros(2, *inputs.A.shape))
    slopes = slopes_of(inputs)
    found = run_both_ways(scan(runner), inputs, slopes)
    expected = run_both_ways(scan(runner), zeros, slopes)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_the_definition_has_the_gradients_of_its_values():
    inputs = scan_inputs([3, 2], channels=2, states=3).map(lambda x: x.double().requires_grad_())

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *others, state = tensors
        return scan("reference")(*others, inputs.offsets, state)

    assert torch.autograd.gradcheck(run, inputs.tensors())


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 8, 9, 63, 64, 65])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sequence_may_be_fed_in_pieces(runner: str, piece: int):
    tokens = 131
    inputs = scan_inputs([tokens], channels=20)
    slopes = slopes_of(inputs)

    def in_pieces(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        whole = ScanInputs(*arguments)
        outputs, state = [], whole.state
        for start in range(0, tokens, piece):
            cut = whole.rows(start, min(start + piece, tokens), state)
            y, state = scan(runner)(*cut.arguments)
            outputs.append(y)
        return torch.cat(outputs), state

    found = run_both_ways(in_pieces, inputs, slopes)
    assert_all_within(found, definition(inputs, slopes), "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_sequences_side_by_side_are_sequences_alone(runner: str, dtype: str):
    lengths = [1, 16, 3, 65, 40]
    inputs = scan_inputs(lengths, channels=50, dtype=dtype)
    together, last_states = scan(runner)(*inputs.arguments)
    start = 0
    for b, length in enumerate(lengths):
        alone = inputs.rows(start, start + length, inputs.state[b : b + 1])
        y, last_state = scan(runner)(*alone.arguments)
        for found, expected in [
            (together[start : start + length], y),
            (last_states[b : b + 1], last_state),
        ]:
            if runner == "reference":  # torch's exp rounds by where in the tensor a value lies
                tolerance = SCAN["bf16" if found.dtype is torch.bfloat16 else "value"]
                assert_within(found, expected, tolerance)
            else:
                assert torch.equal(found, expected)
        start += length


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_sequence_does_not_see_another(runner: str):
    inputs = scan_inputs([6, 30, 9], channels=20)
    spoilt = inputs.map(torch.clone)
    for name in ("u", "dt", "B", "C"):
        getattr(spoilt, name)[6:36] = float("nan")
    spoilt.state[1] = float("nan")
    slopes = slopes_of(inputs)
    clean = run_both_ways(scan(runner), inputs, slopes)
    found = run_both_ways(scan(runner), spoilt, slopes)
    outside = [*range(6), *range(36, 45)]
    for name in ("y", *(f"gradient of {x}" for x in ("u", "dt", "B", "C"))):
        assert torch.equal(found[name][outside], clean[name][outside]), name
        assert found[name][6:36].isnan().all(), name
    for name in ("last_state", "gradient of state"):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_channel_sees_neither_its_neighbours_nor_the_future(runner: str, tokens: int):
    inputs = scan_inputs([tokens], channels=20)
    expected, _ = scan(runner)(*inputs.arguments)
    inputs.u[3, 7] = float("nan")
    found, _ = scan(runner)(*inputs.arguments)
    touched = torch.zeros(tokens, 20, dtype=torch.bool)
    touched[3:, 7] = True
    assert torch.equal(found.isnan(), touched)
    assert torch.equal(found[~touched], expected[~touched])


@pytest.mark.parametrize("tokens", [2, 50])
@pytest.mark.parametrize("runner", RUNNERS)
def test_inputs_are_left_alone_and_outputs_are_fresh(runner: str, tokens: int):
    inputs = scan_inputs([tokens])
    before = inputs.map(torch.clone)
    y, last_state = scan(runner)(*inputs.arguments)
    run_both_ways(scan(runner), inputs, slopes_of(inputs))
    for name in NAMES:
        assert torch.equal(getattr(inputs, name), getattr(before, name)), name
    assert y.is_contiguous()
    assert last_state.is_contiguous()
    taken = {x.untyped_storage().data_ptr() for x in inputs.tensors()}
    assert y.untyped_storage().data_ptr() not in taken
    assert last_state.untyped_storage().data_ptr() not in taken


def columns_apart(x: Tensor) -> Tensor:
    """Return `x` with the values of a row not side by side."""
    return x.t().contiguous().t() if x.dim() > 1 else torch.stack([x, x], 1)[:, 0]


def rows_apart(x: Tensor) -> Tensor:
    """Return `x` as the middle part of wider rows."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), dtype=x.dtype)
    middle = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    middle.copy_(x)
    return middle


@pytest.mark.parametrize("change", [columns_apart, rows_apart])
@pytest.mark.parametrize("tokens", [2, 50])
@pytest.mark.parametrize("runner", RUNNERS)
def test_strides_do_not_matter(runner: str, tokens: int, change):
    inputs = scan_inputs([tokens])
    state = inputs.state.transpose(1, 2).contiguous().transpose(1, 2)
    strided = replace(replace(inputs, state=None).map(change), state=state)
    assert not strided.u.is_contiguous()
    assert not state.is_contiguous()
    for found, expected in zip(
        scan(runner)(*strided.arguments), scan(runner)(*inputs.arguments), strict=True
    ):
        assert_within(found, expected, SCAN["value"])


@pytest.mark.parametrize("change", [columns_apart, lambda x: x[:1].expand_as(x)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_may_arrive_with_any_stride(runner: str, change):
    inputs = scan_inputs([40])
    slopes = slopes_of(inputs)
    y = change(slopes.y)
    last_state = slopes.last_state[:, :1].expand_as(slopes.last_state)
    found = run_both_ways(scan(runner), inputs, Slopes(y, last_state))
    assert_all_within(found, definition(inputs, Slopes(y, last_state)), "fp32")


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_needed_gradient_is_never_lost(runner: str, needed: str):
    inputs = scan_inputs([7])
    slopes = slopes_of(inputs)
    getattr(inputs, needed).requires_grad_()
    y, last_state = scan(runner)(*inputs.arguments)
    if needed in ("C", "skip"):  # these do not reach the state
        y.backward(slopes.y)
    else:
        torch.autograd.backward([y, last_state], [slopes.y, slopes.last_state])
    expected = definition(inputs.map(Tensor.detach), slopes)
    assert_within(
        getattr(inputs, needed).grad, expected[f"gradient of {needed}"], SCAN["gradient"], needed
    )


@pytest.mark.parametrize("used", ["y", "last_state"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_either_output_alone_may_be_used(runner: str, used: str):
    inputs = scan_inputs([7, 40])
    drawn = slopes_of(inputs)
    other = "last_state" if used == "y" else "y"
    slopes = replace(drawn, **{other: torch.zeros_like(getattr(drawn, other))})
    leaves = inputs.map(lambda x: x.clone().requires_grad_())
    outputs = dict(zip(("y", "last_state"), scan(runner)(*leaves.arguments), strict=True))
    outputs[used].backward(getattr(slopes, used))
    expected = definition(inputs, slopes)
    for name in NAMES:
        found = getattr(leaves, name).grad
        gradient = expected[f"gradient of {name}"]
        # C and skip do not reach the state: no gradient is as good as zeros.
        assert_within(
            torch.zeros_like(gradient) if found is None else found, gradient, SCAN["gradient"], name
        )


@pytest.mark.parametrize("runner", RUNNERS)
def test_extreme_steps_neither_overflow_nor_lose_the_state(runner: str):
    tokens = [-1e4, -88.0, -40.0, -15.0, 0.0, 15.0, 40.0, 88.0, 1e4, -1e4, -1e4]
    inputs = scan_inputs([len(tokens)], channels=20)
    inputs.dt[:] = torch.tensor(tokens)[:, None]
    slopes = slopes_of(inputs)
    found = run_both_ways(scan(runner), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes), "fp32")
    # softplus(-1e4) is zero, so that the first token leaves the state as it was.
    quiet = inputs.rows(0, 1, inputs.state)
    quiet.dt_bias.zero_()
    assert torch.equal(scan(runner)(*quiet.arguments)[1], inputs.state)


@pytest.mark.parametrize("runner", RUNNERS)
def test_slow_decay_is_remembered_over_thousands_of_tokens(runner: str):
    # Decays of 1 - 1e-4: an error of one unit in the last place of exp adds up to 6e-4 here.
    inputs = scan_inputs([4096], channels=16, states=16)
    inputs.dt.fill_(-6.9)
    inputs.dt_bias.zero_()
    inputs.A.uniform_(-0.2, -0.05)
    inputs.B.fill_(1.0)
    inputs.u.fill_(1.0)
    y, last_state = scan(runner)(*inputs.arguments)
    wide = inputs.map(Tensor.double)
    expected_y, expected_state = scan("reference")(*wide.arguments)
    assert_within(y, expected_y, SCAN["slow decay"])
    assert_within(last_state, expected_state, SCAN["slow decay"])


@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_threads_changes_no_bit(path: str):
    inputs = scan_inputs([100, 1, 200], channels=640)
    slopes = slopes_of(inputs)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(run_both_ways(scan(path), inputs, slopes))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(other[name], x), name


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    channels=st.integers(1, 70),
    states=st.integers(1, 33),
    dtype=st.sampled_from(["fp32", "bf16"]),
    with_state=st.booleans(),
    runner=st.sampled_from(RUNNERS),
)
@settings(max_examples=60)
def test_any_shape_will_do(lengths, channels, states, dtype, with_state, runner):
    inputs = scan_inputs(lengths, channels, states, dtype, with_state=with_state)
    slopes = slopes_of(inputs)
    found = run_both_ways(scan(runner), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes), dtype)
