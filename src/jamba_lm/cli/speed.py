"""What the machine can do and how fast a model will be on it, measured now and laid out.

Shared by `jamba doctor` and `jamba plan --this-machine`. Imports torch only when it measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jamba_lm.config import JambaConfig

if TYPE_CHECKING:
    from jamba_lm.analysis.prediction import Phase, Prediction
    from jamba_lm.analysis.roofline import Speeds

# What `jamba bench` measures when it is not told otherwise, so that the two can be compared.
PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 512, 64, 512


def predict_speed(config: JambaConfig, weights: str, batch: int) -> Prediction:
    """Predict the speed that `jamba bench --batch` would measure.

    Raises:
        CapacityError: a single layer does not fit into memory.
    """
    from jamba_lm.analysis.prediction import predict
    from jamba_lm.analysis.workload import Workload

    workload = Workload(PROMPT_TOKENS, NEW_TOKENS, batch, PREFILL_TOKENS)
    return predict(config, weights, workload)


def describe_speeds(speeds: Speeds) -> Iterator[str]:
    """Yield the lines that tell a person what the machine can do."""
    amounts = speeds.amounts
    yield (
        f"measured    {speeds.read_bytes / 1e9:.1f} GB/s read from memory, {speeds.threads} threads"
    )
    yield (
        "            matrix products: "
        + ", ".join(f"{unit} {amounts[unit] / 1e9:,.0f} G" for unit in ("fp32", "bf16", "int8"))
        + " operations/s"
    )
    yield f"            scan: {amounts['scan'] / 1e9:.2f} G state updates/s"


def describe_prediction(prediction: Prediction) -> Iterator[str]:
    """Yield the lines that tell a person how fast the model will be, and why not faster."""
    work = prediction.workload
    yield f"{'tokens/s':<14}{'predicted':>12}{'roofline':>12}   what the roofline is made of"
    yield _phase_line(f"prefill {work.num_prompt_tokens:,}", prediction.prefill)
    yield _phase_line(f"decode {work.num_new_tokens:,}", prediction.decode)


def _phase_line(label: str, phase: Phase) -> str:
    largest = sorted(phase.parts.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(
        f"{part} {100 * floor / phase.floor_seconds:.0f} %" for part, floor in largest
    )
    limit = f"{100 * phase.memory_share:.0f} % memory"
    return (
        f"{label:<14}{phase.tokens_per_second:>12,.1f}{phase.roofline_tokens_per_second:>12,.1f}"
        f"   {limit}: {shares}"
    )


def speeds_values(speeds: Speeds) -> dict[str, Any]:
    """Return what `--json` prints of the machine, in bytes and operations a second."""
    return {
        "threads": speeds.threads,
        "read_bytes_per_second": speeds.read_bytes,
        "operations_per_second": dict(speeds.amounts),
    }


def prediction_values(prediction: Prediction) -> dict[str, Any]:
    """Return what `--json` prints of a prediction, in seconds and tokens a second."""
    return {
        "workload": asdict(prediction.workload),
        "machine": speeds_values(prediction.speeds),
        "prefill": _phase_values(prediction.prefill),
        "decode": _phase_values(prediction.decode),
    }


def _phase_values(phase: Phase) -> dict[str, Any]:
    return {
        "tokens_per_second": phase.tokens_per_second,
        "roofline_tokens_per_second": phase.roofline_tokens_per_second,
        "memory_share": phase.memory_share,
        "floor_seconds": dict(phase.parts),
    }
