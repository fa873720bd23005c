"""The error of the vector functions that the kernels are made of, swept over their range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jamba_lm.kernels.tensors import evaluate
from tests.kernels.scan_cases import PATHS
from tests.tolerances import VECTOR_FUNCTIONS

# Every exponent of a negative float32 that matters, with 4,096 mantissas each, and the borders.
MAGNITUDES = np.concatenate(
    [np.linspace(2.0**e, 2.0 ** (e + 1), 4096, dtype=np.float32) for e in range(-30, 8)]
)
EDGES = np.array([0.0, 1e-38, 126.0, 149.0, 200.0, 1e4, 3e38], dtype=np.float32)
NEGATIVE = -np.concatenate([MAGNITUDES, EDGES])


def swept(path: str, function: str, x: np.ndarray) -> np.ndarray:
    return evaluate(path, function, torch.from_numpy(x)).numpy().astype(np.float64)


@pytest.mark.parametrize("path", PATHS)
def test_the_decay_is_exact_near_one_and_close_everywhere(path: str):
    found = swept(path, "exp2", NEGATIVE)
    expected = np.exp2(NEGATIVE.astype(np.float64))
    error = np.abs(found - expected)
    assert error.max() <= VECTOR_FUNCTIONS["exp2 absolute"]
    normal = expected >= 2.0**-125
    assert (error[normal] / expected[normal]).max() <= VECTOR_FUNCTIONS["exp2 relative"]
    near_one = NEGATIVE > -(2.0**-8)
    assert error[near_one].max() <= VECTOR_FUNCTIONS["exp2 near one"]
    assert found[NEGATIVE == 0.0] == 1.0
    assert found.min() >= 0.0


@pytest.mark.parametrize("path", PATHS)
def test_exp_keeps_its_digits_down_to_underflow(path: str):
    found = swept(path, "exp", NEGATIVE)
    expected = np.exp(NEGATIVE.astype(np.float64))
    normal = NEGATIVE >= -87.0
    assert np.abs(found[normal] / expected[normal] - 1).max() <= VECTOR_FUNCTIONS["exp relative"]
    assert found[~normal].max() <= np.exp(-86.9)


@pytest.mark.parametrize("path", PATHS)
def test_softplus_keeps_the_digits_of_its_tail_and_is_linear_far_out(path: str):
    x = np.concatenate([NEGATIVE, -NEGATIVE])
    wide = x.astype(np.float64)
    found = swept(path, "softplus", x)
    expected = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    normal = x >= -87.0
    assert (
        np.abs(found[normal] / expected[normal] - 1).max() <= VECTOR_FUNCTIONS["softplus relative"]
    )
    assert (found[x > 20] == x[x > 20]).all()


@pytest.mark.parametrize("path", PATHS)
def test_sigmoid_keeps_the_digits_of_its_tail(path: str):
    x = np.concatenate([NEGATIVE, -NEGATIVE])
    wide = np.clip(x.astype(np.float64), -700, 700)
    found = swept(path, "sigmoid", x)
    expected = 1 / (1 + np.exp(-wide))
    normal = x >= -87.0
    assert (
        np.abs(found[normal] / expected[normal] - 1).max() <= VECTOR_FUNCTIONS["sigmoid relative"]
    )


@pytest.mark.parametrize("function", ["exp2", "exp", "softplus", "sigmoid"])
@pytest.mark.parametrize("path", PATHS)
def test_a_nan_stays_a_nan(path: str, function: str):
    x = np.full(37, np.nan, dtype=np.float32)
    assert np.isnan(swept(path, function, x)).all()
