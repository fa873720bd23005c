"""What every back-end owes for the operations on rows: RMSNorm and the SiLU gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.kernels import native_rows, reference
from jamba_lm.kernels.library import loaded_library
from tests.tolerances import ROW_OPS, assert_within

EPS = 1e-6
RUNNERS = ["reference", *loaded_library().paths_here]
SHAPES = [(1, 1), (1, 256), (2, 3), (5, 33), (130, 64), (129, 17), (300, 512)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def norm(runner: str) -> Callable[[Tensor, Tensor], Tensor]:
    if runner == "reference":
        return lambda x, weight: reference.rms_norm(x, weight, EPS)
    return lambda x, weight: native_rows.rms_norm(x, weight, EPS, path=runner)


def gate(runner: str) -> Callable[[Tensor, Tensor], Tensor]:
    if runner == "reference":
        return reference.silu_gate
    return lambda x, z: native_rows.silu_gate(x, z, path=runner)


OPERATIONS = {
    "rms_norm": (norm, lambda rows, width: (torch.randn(rows, width), torch.randn(width))),
    "silu_gate": (
        gate,
        lambda rows, width: (3 * torch.randn(rows, width), torch.randn(rows, width)),
    ),
}


def inputs_of(operation: str, shape: tuple[int, int], dtype: str) -> list[Tensor]:
    return [x.to(DTYPES[dtype]) for x in OPERATIONS[operation][1](*shape)]


def in_float64(operation: str, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the defined value, the gradients of the inputs, and the slope they follow."""
    wide = [x.double().requires_grad_() for x in inputs]
    y = OPERATIONS[operation][0]("reference")(*wide)
    slope = torch.randn(y.shape).to(inputs[0].dtype)
    return y.detach(), list(torch.autograd.grad(y, wide, slope.double())), slope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_values_and_gradients_are_those_of_the_definition(
    runner: str, operation: str, shape: tuple[int, int], dtype: str
):
    inputs = inputs_of(operation, shape, dtype)
    expected, gradients, slope = in_float64(operation, inputs)
    narrow = [x.clone().requires_grad_() for x in inputs]
    y = OPERATIONS[operation][0](runner)(*narrow)
    assert y.dtype == inputs[0].dtype
    assert_within(y, expected, ROW_OPS[dtype])
    for x, gradient in zip(narrow, gradients, strict=True):
        (found,) = torch.autograd.grad(y, x, slope, retain_graph=True)
        assert found.dtype == x.dtype
        if shape[1] > 1 or operation != "rms_norm":
            assert_within(found, gradient, ROW_OPS[dtype])


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_norm_of_single_values_is_a_sign_and_has_no_slope(runner: str):
    x = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    weight = torch.tensor([2.0], requires_grad=True)
    y = norm(runner)(x, weight)
    assert_within(y, torch.tensor([[2.0], [-2.0]]), ROW_OPS["fp32"])
    y.sum().backward()
    # The slope is eps / x^3: all else must cancel.
    assert float(x.grad.abs().max()) < ROW_OPS["fp32"]


@pytest.mark.parametrize("size", [0.0, 1e-10, 1e-3])
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_epsilon_of_a_norm_counts_where_values_are_small(runner: str, size: float):
    x, weight = inputs_of("rms_norm", (3, 20), "fp32")
    x = (size * x).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = norm(runner)(x, weight), norm("reference")(wide, weight.double())
    assert_within(y, expected, ROW_OPS["fp32"])
    y.sum().backward()
    expected.sum().backward()
    assert_within(x.grad, wide.grad, ROW_OPS["fp32"])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_strides_do_not_matter_and_inputs_are_left_alone(runner: str, operation: str):
    run = OPERATIONS[operation][0](runner)
    x, other = inputs_of(operation, (6, 20), "fp32")
    expected = run(x, other)
    holder = torch.randn(6, 3, 20)
    holder[:, 1] = x
    for strided in (holder[:, 1], x.t().contiguous().t()):
        before = strided.clone()
        assert not strided.is_contiguous()
        assert_within(run(strided, other), expected, ROW_OPS["fp32"])
        assert torch.equal(strided, before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_leading_axes_are_free(runner: str, operation: str):
    run = OPERATIONS[operation][0](runner)
    x, other = inputs_of(operation, (12, 20), "fp32")
    folded = other.view(3, 4, 20) if other.ndim == 2 else other
    assert torch.equal(run(x.view(3, 4, 20), folded), run(x, other).view(3, 4, 20))
    nothing = other[:0] if other.ndim == 2 else other
    assert run(x[:0], nothing).shape == (0, 20)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("path", loaded_library().paths_here)
def test_the_number_of_threads_changes_no_bit(path: str, operation: str):
    x, other = (one.requires_grad_() for one in inputs_of(operation, (700, 65), "fp32"))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = OPERATIONS[operation][0](path)(x, other)
        found.append([y, *torch.autograd.grad(y, [x, other], torch.ones_like(y))])
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_norm_rounds_before_the_gain(runner: str):
    x, weight = inputs_of("rms_norm", (200, 64), "bf16")
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    before, after = wide.bfloat16() * weight, (wide * weight.float()).bfloat16()
    assert not torch.equal(before, after), "the case must tell the two orders apart"
    # One unit in the last place where float32 sums fall on the two sides of a border.
    assert float((norm(runner)(x, weight) != before).float().mean()) < 0.01


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_gate_neither_overflows_nor_loses_its_tail(runner: str):
    z = torch.tensor([[-1e4, -80.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 80.0, 1e4]])
    found = gate(runner)(torch.ones_like(z), z)
    expected = F.silu(z.double())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-33)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_gradient_that_only_the_gain_needs_is_not_lost(runner: str):
    x, weight = inputs_of("rms_norm", (4, 8), "fp32")
    weight.requires_grad_()
    norm(runner)(x, weight).sum().backward()
    expected = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).sum(0)
    assert_within(weight.grad, expected, ROW_OPS["fp32"])
