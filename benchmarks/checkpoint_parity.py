"""The same checkpoints here and in transformers: how far apart the logits are.

Runs the grid of tests/checkpoint/oracle.py, in both directions and over every back-end: one prompt
in one call, then 16 single tokens. Differences are the largest one in any logit, as a share of the
largest logit. The bfloat16 line compares our distance from transformers' float32 with its own.

    python -m benchmarks.checkpoint_parity [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import JambaForCausalLM

from jamba_lm.kernels.ops import BACKENDS
from jamba_lm.language_model import LanguageModel, load
from tests.checkpoint.oracle import (
    GRID,
    STEPS,
    config_values,
    some_ids,
    their_logits,
    their_model,
)

NOISE_SEEDS = range(20)
NOISE_PROMPT = 16
NOISE_CONFIGS = ["as Jamba v0.1", "as Jamba Reasoning 3B"]


def in_steps(model: LanguageModel, ids: list[int], prompt: int) -> Tensor:
    """Read the prompt in one call and the rest one by one; return all logits, [T, V]."""
    state = model.new_state()
    pieces = [ids[:prompt], *([one] for one in ids[prompt:])]
    return torch.cat([model.logits([piece], [state])[0] for piece in pieces])


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest expected logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def float32_differences() -> dict[str, float]:
    """Return the largest difference over the grid, for each direction and back-end."""
    worst: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        worst[what] = max(worst.get(what, 0.0), value)

    for seed, dials in enumerate(GRID.values()):
        with tempfile.TemporaryDirectory() as temporary:
            theirs_folder, ours_folder = Path(temporary, "theirs"), Path(temporary, "ours")
            theirs = their_model(config_values(dials), seed)
            theirs.save_pretrained(theirs_folder)
            prompt = dials["prompt tokens"]
            ids = some_ids(prompt + STEPS, seed)
            expected = their_logits(theirs, ids, prompt)
            for backend in BACKENDS:
                model = load(theirs_folder, backend=backend)
                found = in_steps(model, ids, prompt)
                note(f"transformers writes, {backend} reads", difference(found, expected))
            model.save(ours_folder)
            back = JambaForCausalLM.from_pretrained(ours_folder)
            again = their_logits(back, ids, prompt)
            for backend in BACKENDS:
                found = in_steps(load(ours_folder, backend=backend), ids, prompt)
                note(f"we write, transformers reads; {backend}", difference(again, found))
    return worst


def bfloat16_ratios() -> dict[str, float]:
    """Return our bfloat16 error over transformers', as medians over tokens and seeds."""
    ratios = {}
    for name in NOISE_CONFIGS:
        errors: dict[str, list[Tensor]] = {who: [] for who in ["transformers", *BACKENDS]}
        for seed in NOISE_SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                rough = their_model(config_values(GRID[name]), seed, torch.bfloat16)
                rough.save_pretrained(folder)
                wide = JambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
                ids = some_ids(NOISE_PROMPT + STEPS, seed)
                exact = their_logits(wide, ids, NOISE_PROMPT)
                found = {"transformers": their_logits(rough, ids, NOISE_PROMPT)}
                for backend in BACKENDS:
                    found[backend] = in_steps(load(folder, backend=backend), ids, NOISE_PROMPT)
            for who, logits in found.items():
                errors[who].append((logits - exact).square().mean(-1).sqrt())
        median = {who: float(torch.cat(all_seeds).median()) for who, all_seeds in errors.items()}
        for backend in BACKENDS:
            ratios[f"{name}, {backend}"] = median[backend] / median["transformers"]
    return ratios


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    wants_json = parser.parse_args().json
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    differences, ratios = float32_differences(), bfloat16_ratios()
    if wants_json:
        result = {"configs": len(GRID), "float32": differences, "bfloat16": ratios}
        print(json.dumps(result, indent=2))
        return
    print(f"float32, largest difference over {len(GRID)} configs, as a share of the largest logit")
    for what, value in differences.items():
        print(f"  {what:44} {value:.1e}")
    print(f"bfloat16, our error over transformers' own, {len(NOISE_SEEDS)} seeds")
    for what, value in ratios.items():
        print(f"  {what:44} {value:.2f}")


if __name__ == "__main__":
    main()
