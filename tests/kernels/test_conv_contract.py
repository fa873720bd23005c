"""What every back-end, on every instruction set, owes for the causal convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.kernels import native_conv, reference
from tests.kernels.scan_cases import DTYPES, PATHS, RUNNERS, offsets_of
from tests.tolerances import CONV, assert_within

NAMES = ("x", "weight", "bias", "state")
SHAPES = [
    ([1], 1, 1),
    ([1], 20, 4),
    ([2, 3, 4, 5], 16, 4),
    ([7, 1, 70], 37, 4),
    ([5, 1], 300, 1),
    ([9, 3], 20, 8),
    ([63, 64, 65], 100, 3),
    ([1, 1, 1], 48, 2),
]


@dataclass(frozen=True)
class ConvInputs:
    """The arguments of `ops.causal_conv`, by short names."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: Tensor
    state: Tensor | None
    silu: bool

    def tensors(self) -> dict[str, Tensor]:
        """Return what may need a gradient, by name."""
        return {name: x for name in NAMES if (x := getattr(self, name)) is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> ConvInputs:
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def rows(self, start: int, end: int, state: Tensor | None) -> ConvInputs:
        return replace(
            self, x=self.x[start:end], offsets=torch.tensor([0, end - start]), state=state
        )


def conv_inputs(
    lengths: Sequence[int],
    channels: int = 37,
    width: int = 4,
    dtype: str = "fp32",
    *,
    silu: bool = True,
    with_bias: bool = True,
    with_state: bool = True,
) -> ConvInputs:
    narrow = DTYPES[dtype]
    return ConvInputs(
        x=torch.randn(sum(lengths), channels).to(narrow),
        weight=torch.randn(channels, width).to(narrow),
        bias=torch.randn(channels).to(narrow) if with_bias else None,
        offsets=offsets_of(lengths),
        state=torch.randn(len(lengths), width - 1, channels).to(narrow) if with_state else None,
        silu=silu,
    )


def run(runner: str, inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.offsets, inputs.state)
    if runner == "reference":
        return reference.causal_conv(*arguments, silu=inputs.silu)
    return native_conv.causal_conv(*arguments, silu=inputs.silu, path=runner)


Slopes = tuple[Tensor, Tensor]


def slopes_of(inputs: ConvInputs) -> Slopes:
    last_state = (len(inputs.offsets) - 1, inputs.weight.shape[1] - 1, inputs.x.shape[1])
    narrow = inputs.x.dtype
    return torch.randn(inputs.x.shape).to(narrow), torch.randn(last_state).to(narrow)


def run_both_ways(
    compute: Callable[[ConvInputs], tuple[Tensor, Tensor]], inputs: ConvInputs, slopes: Slopes
) -> dict[str, Tensor]:
    """Return outputs and all gradients, by name."""
    leaves = inputs.map(lambda x: x.detach().clone().requires_grad_())
    outputs = compute(leaves)
    gradients = torch.autograd.grad(
        outputs,
        list(leaves.tensors().values()),
        [slope.to(y.dtype) for slope, y in zip(slopes, outputs, strict=True)],
    )
    named = {f"gradient of {n}": x for n, x in zip(leaves.tensors(), gradients, strict=True)}
    return {"y": outputs[0].detach(), "last_state": outputs[1].detach(), **named}


def definition(inputs: ConvInputs, slopes: Slopes) -> dict[str, Tensor]:
    """Return outputs and all gradients of the reference in float64."""
    return run_both_ways(lambda wide: run("reference", wide), inputs.map(Tensor.double), slopes)


def assert_all_within(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if x.numel():
            tolerance = CONV["gradient"] if name.startswith("gradient") else CONV["fp32"]
            if found[name].dtype is torch.bfloat16:
                tolerance = CONV["bf16"]
            assert_within(found[name], x, tolerance, name)
        else:
            assert found[name].shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_values_and_gradients_are_those_of_the_definition(
    runner: str, shape: tuple[list[int], int, int], silu: bool, dtype: str
):
    inputs = conv_inputs(*shape, dtype, silu=silu)
    slopes = slopes_of(inputs)
    found = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    assert {x.dtype for x in found.values()} == {DTYPES[dtype]}
    assert_all_within(found, definition(inputs, slopes))


@pytest.mark.parametrize("others", DTYPES)
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_each_input_may_be_of_either_type(runner: str, name: str, others: str):
    types = dict.fromkeys(("x", "weight", "bias"), DTYPES[others])
    types[name] = DTYPES["bf16" if others == "fp32" else "fp32"]
    inputs = conv_inputs([3, 20], channels=20)
    inputs = replace(inputs, **{x: getattr(inputs, x).to(dtype) for x, dtype in types.items()})
    inputs = replace(inputs, state=inputs.state.to(types["x"]))
    slopes = slopes_of(inputs)
    found = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes))


def test_the_definition_is_a_depthwise_convolution():
    inputs = conv_inputs([20], channels=6, silu=False, with_state=False)
    x_CT = F.pad(inputs.x.t(), (3, 0))
    expected = F.conv1d(x_CT[None], inputs.weight[:, None], inputs.bias, groups=6)[0].t()
    assert_within(run("reference", inputs)[0], expected, CONV["fp32"])


def test_the_definition_has_the_gradients_of_its_values():
    inputs = conv_inputs([3, 1], channels=2, width=3).map(lambda x: x.double().requires_grad_())

    def compute(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run("reference", replace(inputs, **dict(zip(NAMES, tensors, strict=True))))

    assert torch.autograd.gradcheck(compute, list(inputs.tensors().values()))


@pytest.mark.parametrize("runner", RUNNERS)
def test_bias_and_state_may_be_absent(runner: str):
    inputs = conv_inputs([5, 2], with_bias=False, with_state=False)
    slopes = slopes_of(inputs)
    found = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes))
    zeros = replace(inputs, bias=torch.zeros(37), state=torch.zeros(2, 3, 37))
    explicit = run_both_ways(lambda leaves: run(runner, leaves), zeros, slopes)
    for name, x in found.items():
        assert torch.equal(explicit[name], x), name


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("piece", [1, 2, 3, 4, 7, 63, 64, 65])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sequence_may_be_fed_in_pieces(runner: str, piece: int, width: int):
    tokens = 131
    inputs = conv_inputs([tokens], channels=20, width=width)
    slopes = slopes_of(inputs)

    def in_pieces(whole: ConvInputs) -> tuple[Tensor, Tensor]:
        outputs, state = [], whole.state
        for start in range(0, tokens, piece):
            y, state = run(runner, whole.rows(start, min(start + piece, tokens), state))
            outputs.append(y)
        return torch.cat(outputs), state

    assert_all_within(run_both_ways(in_pieces, inputs, slopes), definition(inputs, slopes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_sequences_side_by_side_are_sequences_alone(runner: str, dtype: str):
    lengths = [1, 16, 3, 65, 2]
    inputs = conv_inputs(lengths, channels=50, dtype=dtype)
    together, last_states = run(runner, inputs)
    start = 0
    for b, length in enumerate(lengths):
        y, last_state = run(runner, inputs.rows(start, start + length, inputs.state[b : b + 1]))
        assert_within(together[start : start + length], y, CONV[dtype])
        assert torch.equal(last_states[b : b + 1], last_state)
        start += length


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_sequence_does_not_see_another(runner: str):
    inputs = conv_inputs([6, 30, 9], channels=20)
    spoilt = inputs.map(torch.clone)
    spoilt.x[6:36] = float("nan")
    spoilt.state[1] = float("nan")
    slopes = slopes_of(inputs)
    clean = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    found = run_both_ways(lambda leaves: run(runner, leaves), spoilt, slopes)
    outside = [*range(6), *range(36, 45)]
    for name in ("y", "gradient of x"):
        assert torch.equal(found[name][outside], clean[name][outside]), name
        assert found[name][6:36].isnan().all(), name
    for name in ("last_state", "gradient of state"):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_output_sees_its_own_channel_and_width_inputs_back(runner: str):
    inputs = conv_inputs([12], channels=20, width=4)
    inputs.x[3, 7] = float("nan")
    touched = torch.zeros(12, 20, dtype=torch.bool)
    touched[3:7, 7] = True
    assert torch.equal(run(runner, inputs)[0].isnan(), touched)


@pytest.mark.parametrize("runner", RUNNERS)
def test_inputs_are_left_alone_and_outputs_are_fresh(runner: str):
    inputs = conv_inputs([5, 2])
    before = inputs.map(torch.clone)
    y, last_state = run(runner, inputs)
    run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes_of(inputs))
    for name, x in inputs.tensors().items():
        assert torch.equal(x, getattr(before, name)), name
    taken = {x.untyped_storage().data_ptr() for x in inputs.tensors().values()}
    for output in (y, last_state):
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() not in taken


@pytest.mark.parametrize("runner", RUNNERS)
def test_strides_do_not_matter(runner: str):
    inputs = conv_inputs([5, 2])
    expected = run(runner, inputs)
    # The left half of wider rows, as the mixer's input projection leaves it; and columns apart.
    halves = torch.cat([inputs.x, torch.full_like(inputs.x, float("nan"))], 1)
    for x in (halves[:, :37], inputs.x.t().contiguous().t()):
        assert not x.is_contiguous()
        strided = replace(
            inputs,
            x=x,
            weight=inputs.weight.t().contiguous().t(),
            state=inputs.state.transpose(1, 2).contiguous().transpose(1, 2),
        )
        for found, wanted in zip(run(runner, strided), expected, strict=True):
            assert_within(found, wanted, CONV["fp32"])


@pytest.mark.parametrize("change", [lambda g: g.t().contiguous().t(), lambda g: g[:1].expand_as(g)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_may_arrive_with_any_stride(runner: str, change):
    inputs = conv_inputs([40])
    y, last_state = slopes_of(inputs)
    slopes = (change(y), last_state[:, :1].expand_as(last_state))
    found = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes))


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_needed_gradient_is_never_lost(runner: str, needed: str):
    inputs = conv_inputs([7])
    slopes = slopes_of(inputs)
    leaf = getattr(inputs, needed).requires_grad_()
    y, last_state = run(runner, inputs)
    if needed in ("weight", "bias"):  # these do not reach the state
        y.backward(slopes[0])
    else:
        torch.autograd.backward([y, last_state], list(slopes))
    expected = definition(inputs.map(Tensor.detach), slopes)
    assert_within(leaf.grad, expected[f"gradient of {needed}"], CONV["gradient"])


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_state_alone_may_be_used(runner: str, tokens: int):
    inputs = conv_inputs([tokens])
    y, last_state = slopes_of(inputs)
    leaves = inputs.map(lambda x: x.clone().requires_grad_())
    run(runner, leaves)[1].backward(last_state)
    expected = definition(inputs, (torch.zeros_like(y), last_state))
    for name in ("x", "state"):
        found, gradient = getattr(leaves, name).grad, expected[f"gradient of {name}"]
        assert torch.equal(
            torch.zeros_like(gradient) if found is None else found.double(), gradient
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_threads_changes_no_bit(path: str):
    inputs = conv_inputs([300, 1, 200], channels=640)
    slopes = slopes_of(inputs)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(run_both_ways(lambda leaves: run(path, leaves), inputs, slopes))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(other[name], x), name


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    channels=st.integers(1, 70),
    width=st.integers(1, 8),
    dtype=st.sampled_from(list(DTYPES)),
    silu=st.booleans(),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    runner=st.sampled_from(RUNNERS),
)
@settings(max_examples=80)
def test_any_shape_will_do(lengths, channels, width, dtype, silu, with_bias, with_state, runner):
    inputs = conv_inputs(
        lengths, channels, width, dtype, silu=silu, with_bias=with_bias, with_state=with_state
    )
    slopes = slopes_of(inputs)
    found = run_both_ways(lambda leaves: run(runner, leaves), inputs, slopes)
    assert_all_within(found, definition(inputs, slopes))
