"""What a preparation has done, in numbers and samples.

Knows the counts of the phases, and not how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jamba_lm.corpus.columns import Columns
from jamba_lm.corpus.deduplicate_phase import EXACT, NEAR
from jamba_lm.corpus.plan import Plan
from jamba_lm.corpus.read_phase import READ
from jamba_lm.corpus.tally import Tally
from jamba_lm.corpus.tokenize_phase import KEPT

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
SIDES = ("train", "validation")


def build_report(
    plan: Plan, done: Mapping[str, Sequence[Columns]], shards: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Gather the counts of all tasks.

    Everything but `seconds` is the same however the work was cut.

    Args:
        plan: the preparation.
        done: what the tasks of each phase have left.
        shards: of each source, as the manifest has them.
    """
    tally = Tally(plan.recipe.report.samples)
    seconds: dict[str, float] = {}
    for phase in ("read", "deduplicate", "tokenize"):
        for part in done[phase]:
            tally.merge(part.info["tally"])
            seconds[phase] = seconds.get(phase, 0.0) + part.info["cpu_seconds"]
            for stage, spent in part.info.get("stage_seconds", {}).items():
                seconds[f"read: {stage}"] = seconds.get(f"read: {stage}", 0.0) + spent
    return {
        "sources": [
            {
                "name": source.name,
                "weight": source.weight,
                "stages": _stages(plan, tally, source.name, source.stages),
                "result": {side: _total(listed[side]) for side in SIDES},
            }
            for source, listed in zip(plan.recipe.source, shards, strict=True)
        ],
        "total": {
            side: _total([shard for listed in shards for shard in listed[side]]) for side in SIDES
        },
        "cpu_seconds": {name: round(spent, 3) for name, spent in sorted(seconds.items())},
        "recipe": plan.recipe.to_dict(),
    }


def _stages(plan: Plan, tally: Tally, name: str, passed: Sequence[str]) -> list[dict[str, Any]]:
    options = plan.recipe.duplicates
    order = [READ, *passed]
    order += [EXACT] if options.exact else []
    order += [NEAR] if options.near else []
    stages = []
    for stage in [*order, KEPT]:
        row = tally.row(name, stage)
        stages.append(
            {
                "stage": stage,
                **row,
                "dropped": dict(sorted(row["dropped"].items())),
                "counts": dict(sorted(row["counts"].items())),
                "samples": dict(sorted(row["samples"].items())),
            }
        )
    return stages


def _total(shards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {key: sum(one[key] for one in shards) for key in ("documents", "tokens", "text_bytes")}
