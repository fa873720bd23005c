"""Inputs for the selective scan, and every way there is to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from jamba_lm.kernels import native_scan, reference
from jamba_lm.kernels.library import Library, find_library

LIBRARY = find_library()
PATHS = LIBRARY.paths_here if isinstance(LIBRARY, Library) else ()
RUNNERS = ["reference", *PATHS]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What may need a gradient, in the order of the arguments; offsets stand between the last two.
NAMES = ("u", "dt", "dt_bias", "A", "B", "C", "skip", "state")


@dataclass(frozen=True)
class ScanInputs:
    """The arguments of `ops.selective_scan`, by short names."""

    u: Tensor
    dt: Tensor
    dt_bias: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor
    offsets: Tensor
    state: Tensor | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> list[Tensor]:
        """Return what may need a gradient."""
        return [x for name in NAMES if (x := getattr(self, name)) is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> ScanInputs:
        """Apply `change` to all but the offsets."""
        return replace(
            self,
            **{name: change(x) for name in NAMES if (x := getattr(self, name)) is not None},
        )

    def rows(self, start: int, end: int, state: Tensor | None) -> ScanInputs:
        """Cut rows out of a single sequence and continue from `state`."""
        cut = {name: getattr(self, name)[start:end] for name in ("u", "dt", "B", "C")}
        return replace(self, **cut, offsets=torch.tensor([0, end - start]), state=state)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def scan_inputs(
    lengths: Sequence[int],
    channels: int = 37,
    states: int = 16,
    dtype: str = "fp32",
    *,
    with_state: bool = True,
) -> ScanInputs:
    """Draw inputs whose step sizes run from about 1e-3 to 5, as trained models have them."""
    rows = sum(lengths)
    narrow = DTYPES[dtype]
    return ScanInputs(
        u=torch.randn(rows, channels).to(narrow),
        dt=torch.randn(rows, channels).to(narrow),
        dt_bias=3 * torch.randn(channels) - 2,
        A=-8 * torch.rand(channels, states) - 0.01,
        B=torch.randn(rows, states).to(narrow),
        C=torch.randn(rows, states).to(narrow),
        skip=torch.randn(channels),
        offsets=offsets_of(lengths),
        state=torch.randn(len(lengths), channels, states) if with_state else None,
    )


Scan = Callable[..., tuple[Tensor, Tensor]]


def scan(runner: str) -> Scan:
    if runner == "reference":
        return reference.selective_scan
    return lambda *arguments: native_scan.selective_scan(*arguments, path=runner)


@dataclass(frozen=True)
class Slopes:
    """What flows back into the outputs."""

    y: Tensor
    last_state: Tensor


def slopes_of(inputs: ScanInputs) -> Slopes:
    sequences = len(inputs.offsets) - 1
    return Slopes(
        y=torch.randn(inputs.u.shape).to(inputs.u.dtype),
        last_state=torch.randn(sequences, *inputs.A.shape),
    )


def run_both_ways(run: Scan, inputs: ScanInputs, slopes: Slopes) -> dict[str, Tensor]:
    """Return outputs and all gradients, by name."""
    leaves = inputs.map(lambda x: x.detach().clone().requires_grad_())
    y, last_state = run(*leaves.arguments)
    gradients = torch.autograd.grad(
        [y, last_state],
        leaves.tensors(),
        [slopes.y.to(y.dtype), slopes.last_state.to(last_state.dtype)],
    )
    names = [name for name in NAMES if getattr(inputs, name) is not None]
    return {
        "y": y.detach(),
        "last_state": last_state.detach(),
        **{f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)},
    }


def definition(inputs: ScanInputs, slopes: Slopes) -> dict[str, Tensor]:
    """Return outputs and all gradients of the reference in float64."""
    return run_both_ways(scan("reference"), inputs.map(Tensor.double), slopes)
