"""One training step of transformers for each line on stdin; answers with its seconds.

Started by `benchmarks/training.py`, which may end it in the middle of a step that takes too long.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def load(folder: Path, *, parallel_scan: bool) -> Any:
    """Load transformers' model in float32, with its parallel scan (mambapy) when asked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.use_mambapy = parallel_scan
    config.output_router_logits = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.train()


def step(model: Any, ids_BT: torch.Tensor) -> float:
    """Run forward and backward and return the loss, mean over all predicted tokens."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    return float(loss.item())


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel-scan", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.folder, parallel_scan=options.parallel_scan)
    if options.compiled:
        model.compile()
    draw = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.tokens)
    ids_BT = torch.randint(0, model.config.vocab_size, shape, generator=draw)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step(model, ids_BT)
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
