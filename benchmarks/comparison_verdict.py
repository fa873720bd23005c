"""What in the record of `cpu_inference` may not be quoted, and why. Measures nothing."""

from __future__ import annotations

from typing import Any


def problems_of(result: dict[str, Any]) -> list[str]:
    """List everything in a result that may not be quoted, and why.

    Ratios are what the comparison is about: an engine's own speed may vary with the machine's as
    long as its ratio to ours is known. Where ours was not run, speeds are all there is.
    """
    problems = []
    for block in result["blocks"]:
        name = f"{block['shape']} {block['type']}"
        for engine, parity in block["parity"]["engines"].items():
            if parity["problem"]:
                problems.append(f"{name}, {engine}: {parity['problem']}")
        for engine, why in block["parity"]["failed"].items():
            problems.append(f"{name}, {engine}: {why}")
        for what, speed in block["speed"].items():
            for engine, why in speed["failed"].items():
                problems.append(f"{name}, {what}, {engine}: {why}")
            judged = speed["ratios"] or speed["engines"]
            for engine, one in judged.items():
                if one["problem"]:
                    problems.append(f"{name}, {what}, {engine}: {one['problem']}")
        for engine, one in block.get("cold", {}).items():
            if "failed" in one:
                problems.append(f"{name}, first token, {engine}: {one['failed']}")
            elif one["first_token"]["disturbed"]:
                problems.append(f"{name}, first token, {engine}: {one['first_token']['disturbed']}")
    return problems
