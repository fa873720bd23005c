"""One document of very many tokens, forward and backward in one pass of segments.

    nice -n 19 python -m benchmarks.long_document [--tokens 1000000] [--segment 4096] [--out FILE]

A small hybrid reads the source of this package as bytes, end to end and over again, as one
document, and its whole gradient is computed. Printed are the arithmetic that is to be done
(before), the time and the largest memory of the process (after). First the gradient of a shorter
document must be that of an ordinary pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import ROOT, hardware, write_json
from jamba_lm.analysis.machine import peak_memory
from jamba_lm.analysis.training_cost.activations import pass_activations
from jamba_lm.analysis.training_cost.operations import flops_of, pass_operations
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.cli.output import Progress
from jamba_lm.cli.quantities import show_bytes
from jamba_lm.config import JambaConfig
from jamba_lm.data import IGNORED
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.pages import keep_freed_pages
from jamba_lm.training.segments import PassProgress, SegmentedPass, nobody

CONFIG = JambaConfig(
    vocab_size=256,
    d_model=64,
    d_ff=128,
    num_layers=4,
    num_heads=1,
    num_kv_heads=1,
    # torch's kernel takes as long for heads of 8.
    d_head=16,
    attention_period=4,
    attention_offset=2,
    num_experts=4,
    dt_rank=4,
    tie_embeddings=False,
    context_length=2**20,
)
GATE_TOKENS, GATE_SEGMENT, GATE_TOLERANCE = 1500, 400, 1e-4


def document(tokens: int) -> Tensor:
    """Return the source of this package as bytes, over again until there are enough."""
    files = sorted((ROOT / "src" / "jamba_lm").rglob("*.py"))
    source = b"".join(path.read_bytes() for path in files)
    text = source * -(-tokens // len(source))
    return torch.frombuffer(bytearray(text[:tokens]), dtype=torch.uint8).long()


def fresh() -> Decoder:
    """Return the model with its first weights."""
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    initialize(decoder, 0)
    return decoder


def whole_gradient(
    decoder: Decoder, tokens: int, segment: int, told: PassProgress = nobody
) -> float:
    """Leave the gradient of the mean loss of a document in `decoder`; return the loss."""
    ids_M = document(tokens)
    targets_M = ids_M.roll(-1)
    targets_M[-1] = IGNORED
    losses = SegmentedPass(decoder, segment, progress=told).backward(
        ids_M, targets_M, [tokens], entropy_coef=1 / (tokens - 1)
    )
    return losses.entropy / (tokens - 1)


def check() -> float:
    """Return how far a short document's gradient is from an ordinary pass's, over its scale."""
    ours, ordinary = fresh(), fresh()
    whole_gradient(ours, GATE_TOKENS, GATE_SEGMENT)
    ids_M = document(GATE_TOKENS)
    targets_M = ids_M.roll(-1)
    targets_M[-1] = IGNORED
    assert ordinary.head is not None
    hidden_MD = ordinary(ids_M, Batch.of([GATE_TOKENS]), hidden=True)
    total = summed_losses(hidden_MD, ordinary.head.weight, targets_M).total
    (total / (GATE_TOKENS - 1)).backward()
    worst = 0.0
    for one, other in zip(ours.parameters(), ordinary.parameters(), strict=True):
        if other.grad is not None and one.grad is not None:
            scale = other.grad.abs().max().clamp_min(1e-30)
            worst = max(worst, float((one.grad - other.grad).abs().max() / scale))
    return worst


def main() -> None:
    """Check, count, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_pages()
    worst = check()
    if worst > GATE_TOLERANCE:
        sys.exit(f"error: the gradient of a short document is off by {worst:.1e} of its scale")
    print(f"gradient of {GATE_TOKENS:,} tokens: off by {worst:.1e} of its scale, at most")
    rank = Rank(CONFIG, ParallelLayout(), Pass(sequences=1, tokens=options.tokens, width=4))
    ordinary = pass_activations(rank)
    amount: dict[str, float] = {}
    for one in pass_operations(rank):
        flops = flops_of(one)
        # Every layer runs forward twice.
        total = 2 * flops.forward + flops.backward + flops.again
        amount[one.part] = amount.get(one.part, 0.0) + total
    print(f"{options.tokens:,} tokens: an ordinary pass would keep {show_bytes(ordinary.total)}")
    for part, count in amount.items():
        if count:
            print(f"  {part:<24}{count / 1e12:12.3f} T operations")
    sys.stdout.flush()
    decoder, before = fresh(), peak_memory()
    started, processor = time.perf_counter(), time.process_time()
    with Progress("gradient", 0, "segments of layers") as line:
        loss = whole_gradient(
            decoder,
            options.tokens,
            options.segment,
            lambda done, total: line.update(done, total=total),
        )
    seconds, spent = time.perf_counter() - started, time.process_time() - processor
    peak = peak_memory()
    print(
        f"loss {loss:.4f}; {seconds:,.1f} s ({spent:,.1f} s of processor time, {options.threads} "
        f"threads), {options.tokens / spent:,.0f} tokens/s of processor time"
    )
    print(f"largest memory of the process {show_bytes(peak)}, before the pass {show_bytes(before)}")
    result = {
        "tokens": options.tokens,
        "segment": options.segment,
        "loss": loss,
        "seconds": seconds,
        "processor_seconds": spent,
        "peak_bytes": peak,
        "peak_bytes_before": before,
        "ordinary_bytes": ordinary.total,
        "operations": amount,
        "gate": worst,
    }
    write_json(options.out, {"hardware": hardware(), **result})


if __name__ == "__main__":
    main()
