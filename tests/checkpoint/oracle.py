"""transformers' own Jamba, as the oracle: the configs it is asked about, its weights, its answers.

It is trusted for one prompt in one call followed by single tokens, and for nothing else.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import JambaConfig as TheirConfig
from transformers import JambaForCausalLM

STEPS = 16
VOCAB = 61

# Every dial of a config and the values it must take somewhere in the grid.
DIALS: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 2, 3, 4, 5, 6, 7, 8, 9],
    "num_experts": [1, 2, 4, 16],
    "num_experts_per_tok": [1, 2, 3],
    "heads, groups, width": [(4, 4, None), (4, 2, None), (4, 1, None), (4, 2, 6), (3, 1, 16)],
    "attention period, offset": [(1, 0), (2, 0), (3, 1), (3, 2), (4, 3), (5, 2), (8, 4)],
    "expert period, offset": [(1, 0), (2, 0), (2, 1), (3, 2), (4, 1)],
    "hidden_size": [32, 40],
    "mamba_d_state": [4, 8, 16],
    "mamba_expand": [1, 2, 4],
    "mamba_d_conv": [2, 3, 4],
    "mamba_conv_bias": [True, False],
    "mamba_proj_bias": [False, True],
    "mamba_dt_rank": ["auto", 1, 7],
    "tie_word_embeddings": [False, True],
    "prompt tokens": [1, 2, 3, 4, 5, 19],
}


def config_values(dials: dict[str, Any]) -> dict[str, Any]:
    """Spell a choice of `DIALS` in the keys of config.json."""
    heads, groups, width = dials["heads, groups, width"]
    keys = {
        "vocab_size": VOCAB,
        "intermediate_size": 24,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "attn_layer_period": dials["attention period, offset"][0],
        "attn_layer_offset": dials["attention period, offset"][1],
        "expert_layer_period": dials["expert period, offset"][0],
        "expert_layer_offset": dials["expert period, offset"][1],
    }
    if width is not None:
        keys["head_dim"] = width
    return keys | {name: value for name, value in dials.items() if " " not in name}


def draw_grid(count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Draw configs in which the values of every dial appear about equally often."""
    draw = random.Random(seed)
    columns = {}
    for name, values in DIALS.items():
        column = (values * math.ceil(count / len(values)))[:count]
        draw.shuffle(column)
        columns[name] = column
    grid = {}
    for index in range(count):
        dials = {name: column[index] for name, column in columns.items()}
        if dials["num_experts"] > 1:
            fits = min(dials["num_experts_per_tok"], dials["num_experts"])
            dials["num_experts_per_tok"] = fits
        grid[f"drawn {index}"] = dials
    return grid


PLAIN: dict[str, Any] = {name: values[-1] for name, values in DIALS.items()} | {
    "num_hidden_layers": 8,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_dt_rank": "auto",
    "tie_word_embeddings": False,
    "heads, groups, width": (4, 2, None),
    "num_experts_per_tok": 2,
    "expert period, offset": (2, 1),
}
GRID: dict[str, dict[str, Any]] = {
    "as Jamba v0.1": PLAIN,
    "as Jamba Reasoning 3B": PLAIN
    | {
        "num_experts": 1,
        "heads, groups, width": (4, 1, None),
        "attention period, offset": (14, 7),
        "tie_word_embeddings": True,
    },
    "only Mamba": PLAIN | {"num_hidden_layers": 3, "attention period, offset": (4, 3)},
    "only attention": PLAIN | {"num_hidden_layers": 3, "attention period, offset": (1, 0)},
    **draw_grid(count=26, seed=1),
}


def spread(name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Draw the values of one of their parameters so that no term of the model is invisible."""
    noise = torch.randn(shape, generator=draw)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * noise
    if name.endswith("A_log"):
        return torch.arange(1, shape[1] + 1).float().log() + 0.3 * noise
    if name.endswith(".D"):
        return 1 + 0.5 * noise
    if name.endswith("dt_proj.bias"):
        step = torch.exp(-4 + noise)
        return step + torch.log(-torch.expm1(-step))
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith(("conv1d.weight", "embed_tokens.weight")):
        return 0.6 * noise
    # A router of unit gain on normalised rows: far from uniform, so that the choice is clear.
    return noise / math.sqrt(shape[-1])


def their_model(
    values: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> JambaForCausalLM:
    """Build transformers' model of a config, with weights of realistic spread."""
    model = JambaForCausalLM(TheirConfig(**values))
    model.eval()  # type: ignore[no-untyped-call]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(spread(name, parameter.shape, draw))
    model.to(dtype)  # type: ignore[arg-type]
    return model


def some_ids(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (count,), generator=draw).tolist()


def their_logits(model: JambaForCausalLM, ids: list[int], prompt: int) -> Tensor:
    """Read `prompt` ids in one call and the others one by one; return float32 [T, V]."""
    row = torch.tensor([ids])
    with torch.no_grad():
        if set(model.config.layer_types) == {"linear_attention"}:
            # Their cache cannot count tokens without an attention layer, so that a step raises.
            return model(row, use_cache=False).logits[0].float()
        answer = model(row[:, :prompt], use_cache=True)
        logits = [answer.logits]
        for index in range(prompt, len(ids)):
            answer = model(
                row[:, index : index + 1], past_key_values=answer.past_key_values, use_cache=True
            )
            logits.append(answer.logits)
    return torch.cat(logits, dim=1)[0].float()


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect every warning that Python or transformers' logging gives meanwhile."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(level=logging.WARNING)
    library = logging.getLogger("transformers")
    library.addHandler(listener)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
            heard += [str(warning.message) for warning in caught]
    finally:
        library.removeHandler(listener)
