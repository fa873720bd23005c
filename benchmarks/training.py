"""A training step: ours against transformers', its share of the processor's peak, and the rest.

    python -m benchmarks.training [--shape tiny] [--tokens 512] [--threads 2] [--out FILE]

Loss and gradient must agree with transformers' in float32 before anything is timed. Then ours
(bf16 with float32 masters), transformers (float32, eager; its parallel scan when mambapy is
installed; compiled, when --compiled says how long to wait for that) and a matrix product of this
machine's best size take turns. A step of transformers that takes longer than --limit is ended and
reported as such. What is compared is forward and backward;
ours is also timed with its optimizer, and once more under the profiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import select
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity

from benchmarks.checkpoints import checkpoint
from benchmarks.llama_cpp import cache_folder
from benchmarks.ratios import paired
from benchmarks.record import ROOT, hardware, require_green, write_json
from benchmarks.timing import Action, Patience, Stopwatch, timed
from benchmarks.training_peer import load, step
from jamba_lm.data import IGNORED, PackedBatch
from jamba_lm.kernels import ops
from jamba_lm.language_model import load as load_ours
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.training.loss import summed_cross_entropy
from jamba_lm.training.optimizer import MasterAdamW
from jamba_lm.training.output import output_weight
from jamba_lm.training.pages import keep_freed_pages
from jamba_lm.training.recipe import OptimizerSection
from jamba_lm.training.utilization import training_flops

GATE_TOKENS = 32
GATE_TOLERANCE = 1e-3
PRODUCT = (1024, 4096, 4096)
BOTH, WHOLE, PEAK = "ours, forward and backward", "ours, with the optimizer", "matrix product"
EAGER, PARALLEL = "transformers, eager", "transformers with mambapy"
COMPILED = "transformers, compiled"
PEERS = (EAGER, PARALLEL, COMPILED)

# What the profiler calls things, and what they are.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "scan": ("_SelectiveScan",),
    "convolution": ("_CausalConv",),
    "norms": ("_RMSNorm",),
    "gates": ("_SiLUGate",),
    "attention": ("aten::_scaled_dot_product",),
    "AdamW": ("aten::_fused_adamw_",),
    "copies, sums and casts": (
        *("aten::copy_", "aten::add", "aten::cat", "aten::sum", "aten::mul", "aten::fill_"),
        *("aten::index", "aten::zero_", "aten::linalg_vector_norm", "aten::scatter"),
    ),
}


class Ours:
    """Our model, its optimizer and one batch."""

    def __init__(self, folder: Path, dtype: torch.dtype, sequences: int, tokens: int) -> None:
        self.decoder: Decoder = load_ours(folder, dtype=torch.float32).decoder
        self.decoder.requires_grad_(True)
        self.optimizer = MasterAdamW(self.decoder, OptimizerSection())
        self.decoder.to(dtype)
        draw = torch.Generator().manual_seed(0)
        vocab = self.decoder.config.vocab_size
        self.ids_BT = torch.randint(0, vocab, (sequences, tokens), generator=draw)
        targets_BT = self.ids_BT.roll(-1, 1)
        targets_BT[:, -1] = IGNORED
        self.packed = PackedBatch(self.ids_BT.flatten(), targets_BT.flatten(), [tokens] * sequences)

    def both(self) -> float:
        """Run forward and backward and return the mean loss."""
        batch = Batch.of(self.packed.lengths, routing=[])
        hidden_MD = self.decoder(self.packed.ids_M, batch, hidden=True)
        weight_VD = output_weight(self.decoder)
        summed = summed_cross_entropy(hidden_MD, weight_VD, self.packed.targets_M)
        mean = summed / self.packed.num_targets
        mean.backward()
        return float(mean.item())

    def forget(self) -> None:
        """Throw the gradients away, as transformers' `zero_grad` does."""
        for parameter in self.decoder.parameters():
            parameter.grad = None

    def forward_and_backward(self) -> None:
        """Do what transformers is timed doing."""
        self.forget()
        self.both()

    def whole(self) -> None:
        """Take a step."""
        self.both()
        self.optimizer.collect()
        self.optimizer.step(1e-5)


class Peer:
    """transformers in a process of its own, which can be ended."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        if self._answer(600.0) != "ready":
            sys.exit("error: transformers did not load the checkpoint; its message is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def seconds(self, limit: float) -> float | None:
        """Return what a step took; None when it took longer than the limit, and is the last."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer(limit)
        return None if answer is None else float(answer)

    def seconds_at_most(self, limit: float) -> float:
        """Return what a step took, or the limit that it reached."""
        seconds = self.seconds(limit)
        return limit if seconds is None else seconds

    def _answer(self, limit: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            return None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("error: transformers ended in the middle of a step; its message is above")
        return json.loads(line)


def require_agreement(folder: Path, sequences: int) -> dict[str, float]:
    """Compare loss and gradient norm with transformers' in float32; end if they differ."""
    ours = Ours(folder, torch.float32, sequences, GATE_TOKENS)
    theirs = load(folder, parallel_scan=False)
    losses = ours.both(), step(theirs, ours.ids_BT)
    norms = [
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        for model in (ours.decoder, theirs)
    ]
    found = {
        "loss": abs(losses[0] / losses[1] - 1.0),
        "gradient norm": abs(norms[0] / norms[1] - 1.0),
    }
    for what, difference in found.items():
        if not difference <= GATE_TOLERANCE:
            sys.exit(f"error: the {what} differs by {difference:.1e}; nothing was measured")
    return found


def product_action(dtype: torch.dtype) -> Action:
    """Return a matrix product of a size that reaches the peak."""
    rows, inner, columns = PRODUCT
    x, w = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    return timed(lambda: torch.nn.functional.linear(x, w))


def profile_of(ours: Ours) -> dict[str, float]:
    """Return the seconds of each part of a whole step under the profiler, on this thread."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        ours.whole()
        seconds = time.perf_counter() - started
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        for part, names in PARTS.items():
            if event.key.startswith(names):
                parts[part] += 1e-6 * event.self_cpu_time_total
                break
    return {**parts, "Python, autograd and all else": seconds - sum(parts.values())}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time everything in turn and return the record."""
    agreement = require_agreement(folder, options.sequences)
    ours = Ours(folder, torch.bfloat16, options.sequences, options.tokens)
    config, rows = ours.decoder.config, options.sequences * options.tokens
    actions: dict[str, Action] = {
        BOTH: timed(ours.forward_and_backward),
        WHOLE: timed(ours.whole),
        PEAK: product_action(torch.bfloat16),
    }
    common = [sys.executable, "-m", "benchmarks.training_peer", str(folder)]
    common += ["--sequences", str(options.sequences), "--threads", str(options.threads)]
    common += ["--tokens", str(options.their_tokens)]
    peers = {} if options.alone else {EAGER: common}
    if peers and importlib.util.find_spec("mambapy") is not None:
        peers[PARALLEL] = [*common, "--parallel-scan"]
    if peers and options.compiled:
        peers[COMPILED] = [*common, "--compiled"]
    too_slow: dict[str, float] = {}
    with ExitStack() as stack:
        pids: list[int] = []
        for name, command in peers.items():
            peer = stack.enter_context(Peer(command))
            limit = options.compiled if name == COMPILED else options.limit
            if peer.seconds(limit) is None:
                too_slow[name] = limit
                continue
            pids.append(peer.pid)
            actions[name] = partial(peer.seconds_at_most, options.limit)
        watch = Stopwatch(options.threads, pids=lambda: pids)
        patience = Patience(options.samples, 40, options.seconds)
        verdicts = watch.alternate(actions, patience)
    flops = training_flops(config, rows)
    per_second = {name: rows / verdicts[name].seconds for name in (BOTH, WHOLE)}
    per_second |= {
        name: options.sequences * options.their_tokens / verdicts[name].seconds
        for name in PEERS
        if name in verdicts
    }
    product = 2.0 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
    # How much longer than a product a step takes, round by round.
    against_peak = {name: paired(verdicts[name], verdicts[PEAK]) for name in (BOTH, WHOLE)}
    against_peers = {
        name: paired(verdicts[name], verdicts[BOTH]) for name in PEERS if name in verdicts
    }
    share = rows / (options.sequences * options.their_tokens)
    return {
        "hardware": hardware(),
        "shape": options.shape,
        "rows": rows,
        "their_rows": options.sequences * options.their_tokens,
        "agreement": agreement,
        "tokens_per_second": per_second,
        "no_step_within_seconds": too_slow,
        "peak_flops": product / verdicts[PEAK].seconds,
        "mfu": {name: flops / product / one.median for name, one in against_peak.items()},
        "times_as_fast": {name: share * one.median for name, one in against_peers.items()},
        "ratios": {
            name: asdict(one)
            for name, one in {
                **{f"{name} / product": one for name, one in against_peak.items()},
                **{f"{name} / {BOTH}": one for name, one in against_peers.items()},
            }.items()
        },
        "profile_seconds": profile_of(ours),
        "backends": {op: ops.choose(op).__name__ for op in ("selective_scan", "causal_conv")},
        "problems": {
            name: one.problem
            for name, one in (*against_peak.items(), *against_peers.items())
            if one.problem
        },
        "samples": {name: asdict(one) for name, one in verdicts.items()},
    }


def render(result: dict[str, Any]) -> str:
    """Return the result as Markdown tables."""
    speeds, mfu = result["tokens_per_second"], result["mfu"]
    lines = [
        f"{result['shape']}, {result['rows']:,} tokens a step, {result['hardware']['threads']} "
        f"threads; transformers {result['their_rows']:,} tokens",
        "",
        "| | tokens/s | ours is | of the product's peak |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, speed in speeds.items():
        share = f"{100 * mfu[name]:.0f} %" if name in mfu else ""
        times = "" if name in mfu else f"{result['times_as_fast'][name]:.1f} times as fast"
        lines.append(f"| {name} | {speed:,.0f} | {times} | {share} |")
    for name, limit in result["no_step_within_seconds"].items():
        least = speeds[BOTH] * limit / result["their_rows"]
        lines.append(f"| {name} | no step within {limit:g} s | more than {least:,.0f} times | |")
    lines += ["", f"peak of a bf16 product {PRODUCT}: {result['peak_flops'] / 1e9:,.0f} GFLOP/s"]
    lines += ["", "| part of a whole step, profiled | ms | share |", "| --- | ---: | ---: |"]
    parts = result["profile_seconds"]
    whole = sum(parts.values())
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {1e3 * seconds:,.1f} | {100 * seconds / whole:.0f} % |")
    for name, problem in result["problems"].items():
        lines += ["", f"CONTAMINATED, do not quote: {name}: {problem}"]
    return "\n".join(lines)


def main() -> None:
    """Print the tables and, with --out, write the JSON record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--their-tokens", type=int, help="of transformers; --tokens when not said")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a step of theirs")
    parser.add_argument(
        "--compiled", type=float, default=0.0, help="seconds for theirs to compile and take a step"
    )
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--samples", type=int, default=7, help="quiet samples wanted")
    parser.add_argument("--seconds", type=float, default=120.0, help="most time for the samples")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for checkpoints")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    options.their_tokens = options.their_tokens or options.tokens
    require_green("tests/training/test_optimizer.py", "tests/training/test_loss.py")
    keep_freed_pages()
    torch.set_num_threads(options.threads)
    result = measure(options, checkpoint(options.shape, options.cache))
    print(render(result))
    write_json(options.out, result)
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
