"""The selective scan alone: time per element, against loops, a parallel scan and the processor.

    python -m benchmarks.selective_scan [--tokens 512] [--channels 2048] [--threads 1] [--out FILE]

An element is one (token, channel, state). The contract tests run first. The loop is the
definition in `kernels/reference.py`, which steps through time in Python as transformers does;
mambapy's parallel scan takes part when it is installed (`pip install mambapy`).
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quiet import Verdict
from benchmarks.record import hardware, require_green, write_json
from benchmarks.timing import Action, Patience, Stopwatch, timed
from jamba_lm.kernels import native_scan, reference
from jamba_lm.kernels.library import loaded_library

STATES = 16
BOTH = "forward+backward"
LOOP, PARALLEL = "loop over time in Python", "mambapy, parallel scan"
PATIENCE = Patience(wanted=15, most=200, seconds=60.0)
# The loops take seconds each.
SLOW_PATIENCE = Patience(wanted=3, most=8, seconds=120.0)


def inputs_of(tokens: int, channels: int, *, gradients: bool) -> list[Tensor]:
    """Draw u, dt, its bias, A, B, C and D as a fresh Mamba layer would see them."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = [
        normal(tokens, channels),
        0.1 * normal(tokens, channels),
        normal(channels) - 4.5,
        -torch.arange(1.0, STATES + 1).repeat(channels, 1),
        normal(tokens, STATES),
        normal(tokens, STATES),
        torch.ones(channels),
    ]
    return [x.requires_grad_(gradients) for x in inputs]


def run_native(inputs: list[Tensor], offsets: Tensor, path: str) -> Tensor:
    """Run the native scan of one instruction set."""
    u, dt, bias, A, B, C, skip = inputs
    return native_scan.selective_scan(u, dt, bias, A, B, C, skip, offsets, None, path=path)[0]


def native_actions(tokens: int, channels: int, path: str) -> dict[str, Action]:
    """Return the native scan of one instruction set, forward and with its gradients."""
    offsets = torch.tensor([0, tokens])
    plain = inputs_of(tokens, channels, gradients=False)
    learning = inputs_of(tokens, channels, gradients=True)
    slope_MC = torch.ones(tokens, channels)

    def both() -> None:
        torch.autograd.grad(run_native(learning, offsets, path), learning, slope_MC)

    def forward() -> None:
        run_native(plain, offsets, path)

    return {f"{path} forward": timed(forward), f"{path} {BOTH}": timed(both)}


def loop_actions(tokens: int, channels: int) -> dict[str, Action]:
    """Return the definition: a loop over time in Python."""
    u, dt, bias, A, B, C, skip = inputs_of(tokens, channels, gradients=False)
    offsets = torch.tensor([0, tokens])

    def forward() -> None:
        reference.selective_scan(u, dt, bias, A, B, C, skip, offsets)

    return {f"{LOOP} forward": timed(forward)}


def parallel_scan_actions(tokens: int, channels: int) -> dict[str, Action]:
    """Return mambapy's parallel scan, on inputs made as it wants them."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found, import-untyped, unused-ignore]

    u, dt, bias, A, B, C, _ = inputs_of(tokens, channels, gradients=True)

    def run() -> Tensor:
        step = torch.nn.functional.softplus(dt + bias)[None, :, :, None]
        decay = torch.exp(step * A)
        hidden = pscan(decay, step * B[None, :, None, :] * u[None, :, :, None])
        return (hidden @ C[None, :, :, None]).squeeze(-1)

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run().sum(), [u, dt, bias, A, B, C])

    return {f"{PARALLEL} forward": timed(forward), f"{PARALLEL} {BOTH}": timed(both)}


def measure(tokens: int, channels: int, threads: int) -> dict[str, Any]:
    """Time everything, what is compared side by side, and throw away what was disturbed."""
    watch = Stopwatch(threads)
    paths = loaded_library().paths_here
    native: dict[str, Action] = {}
    for path in paths:
        native |= native_actions(tokens, channels, path)
    verdicts = watch.alternate(native, PATIENCE, warm_up=3)
    slow = loop_actions(tokens, channels)
    if importlib.util.find_spec("mambapy") is not None:
        slow |= parallel_scan_actions(tokens, channels)
    verdicts |= watch.alternate(slow, SLOW_PATIENCE)
    elements = tokens * channels * STATES
    return {
        "hardware": hardware(),
        "elements": elements,
        "fma_nanoseconds": {name: one.multiply_adds for name, one in verdicts.items()},
        "problems": {
            name: verdict.problem for name, verdict in verdicts.items() if verdict.problem
        },
        "samples": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "nanoseconds_per_element": by_scan(verdicts, elements),
    }


def by_scan(verdicts: dict[str, Verdict], elements: int) -> dict[str, dict[str, float]]:
    """Return nanoseconds per element of each scan, forward and with its gradients."""
    table: dict[str, dict[str, float]] = {}
    for name, verdict in verdicts.items():
        scan, _, what = name.rpartition(" ")
        table.setdefault(scan, {})[what] = 1e9 * verdict.seconds / elements
    return table


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table; ratios are to the first row."""
    per_element = result["nanoseconds_per_element"]
    first = next(iter(per_element.values()))
    lines = [
        "| scan | forward, ns | ratio | forward + backward, ns | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, each in per_element.items():
        cells = [name]
        for what in ("forward", "forward+backward"):
            known = what in each
            cells.append(f"{each[what]:.3f}" if known else "not run")
            cells.append(f"{each[what] / first[what]:.1f}" if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slots(result: dict[str, Any], path: str) -> str:
    """Say how many multiply-adds of the widest vectors as many elements take, side by side."""
    shortest, longest = result["fma_nanoseconds"][f"{path} forward"]
    elements = STATES * result["nanoseconds_per_element"][path]["forward"]
    return (
        f"one multiply-add of the widest vectors takes {shortest:.4f} to {longest:.4f} ns; "
        f"{STATES} elements of the {path} forward pass take the time of {elements / longest:.1f} "
        f"to {elements / shortest:.1f} of them"
    )


def main() -> None:
    """Print a table and, with --out, write the JSON record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    require_green("tests/kernels/test_scan_contract.py")
    torch.set_num_threads(options.threads)
    result = measure(options.tokens, options.channels, options.threads)
    print(table(result))
    print(f"\n{slots(result, loaded_library().paths_here[0])}")
    print(f"{result['hardware']}")
    for name, problem in result["problems"].items():
        print(f"CONTAMINATED, do not quote: {name}: {problem}")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
