"""Predicted against measured: the seconds of a training step and the memory of a pass.

    python -m benchmarks.training_plan [--workers 1 2] [--out FILE]

A step is forward, backward and optimizer as the trainer does them, of shapes that differ in width,
layers, experts, share of attention and tokens. Its prediction adds up operations that were measured
one at a time (training/operation_speed.py), in the list that `jamba plan train` counts with. Both
are processor seconds divided by workers, best of several, so that other processes disturb little.
The memory of a pass is torch's own count of what autograd keeps, and must be exact.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import hardware, require_green, write_json
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.step import step_time
from jamba_lm.config import JambaConfig
from jamba_lm.data import IGNORED, PackedBatch
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.routing import Routing, balance_loss
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.presets import preset
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.operation_speed import MeasuredMachine
from jamba_lm.training.optimizer import MasterAdamW, whole_norm
from jamba_lm.training.output import output_weight
from jamba_lm.training.pages import keep_freed_pages
from jamba_lm.training.recipe import OptimizerSection
from jamba_lm.training.workers import Workers

BASE = JambaConfig(
    vocab_size=4096, d_model=128, d_ff=256, num_layers=4, num_heads=4, num_kv_heads=2, num_experts=4
)
NO_ATTENTION = {"attention_period": 99, "attention_offset": 98}
# Sequences, tokens of each, and the shape.
SHAPES: dict[str, tuple[int, int, JambaConfig]] = {
    "narrow, 4 experts": (1, 512, BASE.replace(attention_period=4, attention_offset=2)),
    "tiny, 2 x 512": (2, 512, preset("tiny")),
    "tiny, 4 x 512": (4, 512, preset("tiny")),
    "dense": (1, 512, BASE.replace(d_model=256, d_ff=768, num_experts=1)),
    "attention only": (
        2,
        512,
        BASE.replace(d_model=256, num_experts=1, attention_period=1, attention_offset=0),
    ),
    "Mamba only": (1, 768, BASE.replace(d_model=192, num_layers=6, num_experts=1, **NO_ATTENTION)),
    "wide, 8 experts": (1, 512, BASE.replace(d_model=512, d_ff=768, num_experts=8)),
    "deep, 16 experts": (2, 512, BASE.replace(num_layers=12, num_experts=16)),
}
TRIES = 7
WARM_UP = 2


class Trainee:
    """A model, its optimizer and a batch for each worker."""

    def __init__(self, config: JambaConfig, sequences: int, tokens: int, workers: int) -> None:
        with torch.device("meta"):
            decoder = Decoder(config)
        initialize(decoder, 0)
        self.optimizer = MasterAdamW(decoder, OptimizerSection())
        decoder.to(torch.bfloat16)
        self.workers = Workers(decoder, workers)
        self.optimizer.share_out(self.workers.decoders[1:], self.workers.spread)
        draw = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(workers):
            ids_BT = torch.randint(0, config.vocab_size, (sequences, tokens), generator=draw)
            targets_BT = ids_BT.roll(-1, 1)
            targets_BT[:, -1] = IGNORED
            self.batches.append(
                PackedBatch(ids_BT.flatten(), targets_BT.flatten(), [tokens] * sequences)
            )

    def step(self) -> None:
        """Take one step, as `training.learner` does."""
        self.workers.run(self._pass, self.batches)
        self.optimizer.collect(len(self.batches))
        norms = self.optimizer.gradient_norms()
        self.optimizer.step(1e-5, whole_norm(norms))

    def _pass(self, decoder: Decoder, packed: PackedBatch) -> None:
        routing: list[Routing] = []
        batch = Batch.of(packed.lengths, routing=routing)
        hidden_MD = decoder(packed.ids_M, batch, hidden=True)
        sums = summed_losses(hidden_MD, output_weight(decoder), packed.targets_M)
        loss = sums.total / packed.num_targets
        if routing:
            loss = loss + 0.01 * balance_loss(routing)
        loss.backward()


def measured(trainee: Trainee, workers: int) -> list[float]:
    """Return the processor seconds of each worker in each of several steps."""
    seconds = []
    for number in range(WARM_UP + TRIES):
        started = time.process_time()
        trainee.step()
        if number >= WARM_UP:
            seconds.append((time.process_time() - started) / workers)
    return seconds


def compare(name: str, workers: int, machine: MeasuredMachine) -> dict[str, Any]:
    """Predict and measure a step of one shape."""
    sequences, tokens, config = SHAPES[name]
    rank = Rank(config, ParallelLayout(), Pass(sequences=sequences, tokens=tokens))
    # Each worker makes one pass; the optimizer is shared out among them.
    predicted = step_time(rank, machine, passes=1)
    raw = measured(Trainee(config, sequences, tokens, workers), workers)
    return {
        "shape": name,
        "workers": workers,
        "rows": sequences * tokens * workers,
        "predicted_seconds": predicted.seconds,
        "measured_seconds": min(raw),
        "raw_seconds": raw,
        "ratio": predicted.seconds / min(raw),
        "parts": {
            part: predicted.forward[part] + predicted.backward[part] for part in predicted.forward
        },
        "optimizer_seconds": predicted.optimizer,
    }


def main() -> None:
    """Compare all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    require_green("tests/analysis/training_cost/test_activations.py")
    keep_freed_pages()
    rows = []
    print(f"{'shape':<20}{'workers':>8}{'predicted':>12}{'measured':>12}{'ratio':>8}", flush=True)
    for workers in options.workers:
        torch.set_num_threads(workers)
        machine = MeasuredMachine(workers)
        for name in options.shapes:
            torch.set_num_threads(workers)
            found = compare(name, workers, machine)
            rows.append(found)
            print(
                f"{name:<20}{workers:>8}{1e3 * found['predicted_seconds']:>9.1f} ms"
                f"{1e3 * found['measured_seconds']:>9.1f} ms{found['ratio']:>8.2f}",
                flush=True,
            )
    within = sum(abs(one["ratio"] - 1) <= 0.25 for one in rows)
    print(f"{within} of {len(rows)} within 25 %")
    write_json(options.out, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
