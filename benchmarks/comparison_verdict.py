"""What in the record of `cpu_inference` may not be quoted, and why. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.quiet import agree

# The limits of the machine, before and after, differ by no more than this share.
PEAKS_STEADY = 0.10


def problems_of(result: dict[str, Any]) -> list[str]:
    """List everything in a result that may not be quoted, and why."""
    problems = calibration_problems(result["peaks"], result["peaks_after"])
    for block in result["blocks"]:
        name = f"{block['shape']} {block['type']}"
        for engine, parity in block["parity"]["engines"].items():
            if parity["problem"]:
                problems.append(f"{name}, {engine}: {parity['problem']}")
        for what, engine, one in verdicts_of(block):
            if one["problem"]:
                problems.append(f"{name}, {what}, {engine}: {one['problem']}")
    return problems


def calibration_problems(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the limits of the machine that were not the same at both ends of the run."""
    pairs = {"memory reads": (before["read_bytes"], after["read_bytes"])}
    for name, flops in before["product_flops"].items():
        pairs[f"{name} products"] = (flops, after["product_flops"][name])
    return [
        f"the rooflines: {name} were at {one:.3g} a second before the run and {other:.3g} after"
        for name, (one, other) in pairs.items()
        if abs(one - other) > PEAKS_STEADY * min(one, other)
    ]


def verdicts_of(block: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield every verdict of a block with what was measured, and of which engine."""
    for what, speed in block["speed"].items():
        for engine, one in speed["engines"].items():
            yield what, engine, one
    for engine, one in block.get("cold", {}).items():
        yield "first token", engine, one["first_token"]


def judge_again(result: dict[str, Any]) -> None:
    """Mark the blocks that were taken while the machine was slower than it later proved to be."""
    best = result["fma_nanoseconds"]
    for block in result["blocks"]:
        for _, _, one in verdicts_of(block):
            if one["problem"] is None and not agree(one["reference"], best):
                one["problem"] = (
                    f"a multiply-add took {one['reference']:.4f} ns, later {best:.4f} ns"
                )
