"""What is shown of a training run while it goes on: a progress line, held-out results, spikes."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from jamba_lm.cli.output import Output, Progress


class TrainingProgress:
    """Takes the records of a run's log and shows what a person wants of them."""

    def __init__(self, output: Output, steps: int) -> None:
        self._output = output
        self._steps = steps
        self._line: Progress | None = None
        self._pass: Progress | None = None
        self._first = 0
        self._rate = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for line in (self._line, self._pass):
            if line is not None:
                line.clear()

    def pass_progress(self, done: int, total: int) -> None:
        """Show how far a pass in segments is: it may take hours, of which the log says nothing."""
        if self._pass is None:
            # Both lines are written to one place of a terminal.
            if self._line is not None:
                self._line.clear()
            self._pass = self._output.progress("a pass", total, "segments of layers")
        self._pass.update(done)
        if done == total:
            self._pass = None

    def report(self, record: Mapping[str, Any]) -> None:
        """Show one record."""
        if record["event"] == "validation":
            self._output.note(
                f"step {record['step']:,}: {record['bits_per_byte']:.4f} bits per byte on "
                f"{record['num_bytes']:,} held-out bytes"
            )
        elif record["event"] == "step":
            self._step(record)

    def _step(self, record: Mapping[str, Any]) -> None:
        if self._line is None:
            self._first = record["step"] - 1
            label = f"training from step {self._first:,}" if self._first else "training"
            self._line = self._output.progress(label, self._steps - self._first, "steps")
        now = record["tokens_per_second"]
        self._rate = 0.95 * self._rate + 0.05 * now if self._rate else now
        if "spike" in record:
            self._output.note(
                f"step {record['step']:,}: the loss spiked to {record['loss']:.3f}, "
                f"{record['spike']}"
            )
        self._line.update(
            record["step"] - self._first,
            f"{self._rate:,.0f} tokens/s, loss {record['loss']:.3f}, "
            f"balance {record['balance_loss']:.3f}",
        )
