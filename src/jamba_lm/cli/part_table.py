"""Where the time of a measurement went, part by part, as `jamba bench --parts` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jamba_lm.analysis.workload import Parts, Timing, Workload

OUTSIDE = "around the calls"
COLUMNS = {
    "cutting_weights": "weights",
    "cutting_rows": "rows",
    "giving_results": "results",
    "waiting": "waiting",
}


def part_lines(workload: Workload, timing: Timing) -> list[str]:
    """Lay out milliseconds of a prompt and of one step, largest first.

    Args:
        workload: what was measured.
        timing: by parts.
    """
    lines = []
    for title, seconds, parts, steps in (
        (f"prefill {workload.num_prompt_tokens:,}", *_phase(timing, "prefill"), 1),
        ("a step of decode", *_phase(timing, "decode"), workload.num_new_tokens),
    ):
        lines += [
            "",
            f"{title + ', ms':<24}{'all':>10}{'share':>8}"
            + "".join(f"{name:>10}" for name in COLUMNS.values()),
        ]
        rows = sorted(parts.items(), key=lambda row: -row[1].whole)
        for part, time in rows:
            details = "".join(_cell(getattr(time, field) / steps) for field in COLUMNS)
            lines.append(f"{part:<24}{_share(time.whole / steps, seconds / steps)}{details}")
        outside = max(0.0, seconds - sum(time.whole for time in parts.values()))
        lines.append(f"{OUTSIDE:<24}{_share(outside / steps, seconds / steps)}")
    lines.append(
        "weights, rows and results: arranging them for products of many rows, and storing what "
        "comes out; waiting: for the other threads"
    )
    return lines


def part_values(timing: Timing) -> dict[str, Any]:
    """Return seconds of the whole measurement for `--json`."""
    return {
        phase: {
            "seconds": seconds,
            "parts": {
                part: {"seconds": time.whole, **time._asdict()} for part, time in parts.items()
            },
        }
        for phase in ("prefill", "decode")
        for seconds, parts in (_phase(timing, phase),)
    }


def _phase(timing: Timing, phase: str) -> tuple[float, Parts]:
    seconds, parts = getattr(timing, f"{phase}_seconds"), getattr(timing, f"{phase}_parts")
    assert parts is not None
    return seconds, parts


def _share(own: float, whole: float) -> str:
    return f"{1e3 * own:>10.3f}{100 * own / whole:>7.1f}%"


def _cell(seconds: float) -> str:
    return f"{1e3 * seconds:>10.3f}" if seconds > 0 else " " * 10
