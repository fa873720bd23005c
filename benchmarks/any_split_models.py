"""The two models that `any_split.py` compares, and what both of them read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JambaConfig as PeerConfig
from transformers import JambaForCausalLM as PeerModel

import jamba_lm
from jamba_lm.language_model import LanguageModel

Ids = list[int]


class Bench:
    """Both models, a few prompts, and the answers that everyone should give."""

    def __init__(self, folder: Path) -> None:
        config = PeerConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=4,
            attn_layer_offset=2,
            num_experts=4,
            initializer_range=0.15,
            pad_token_id=0,
            eos_token_id=256,
        )
        torch.manual_seed(1)
        self.peer: Any = PeerModel(config)
        torch.nn.Module.eval(self.peer)
        give_steps_of_mamba(self.peer)
        self.peer.save_pretrained(folder)
        self.model: LanguageModel = jamba_lm.load(folder)

        draw = torch.Generator().manual_seed(2)
        self.prompts: list[Ids] = [
            torch.randint(1, 256, (length,), generator=draw).tolist() for length in (23, 9, 70)
        ]
        self.branches: list[Ids] = [
            torch.randint(1, 256, (length,), generator=draw).tolist() for length in (6, 6)
        ]

    @torch.no_grad()
    def answer(self, ids: Ids) -> Tensor:
        """Return the logits [T, V] that everyone should give: transformers' for the whole."""
        return self.peer(torch.tensor([ids])).logits[0]

    @torch.no_grad()
    def ask(self, rows: Sequence[Ids], **options: object) -> Tensor:
        """Call transformers with rows of one length; returns logits [B, T, V]."""
        return self.peer(torch.tensor(rows), **options).logits

    def first_logits(self, ids: Ids, **options: object) -> Tensor:
        """Let transformers' `generate` read `ids`; returns the logits [1, V] of the next token."""
        out = self.peer.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        return out.logits[0]


def give_steps_of_mamba(model: Any) -> None:
    """Set the biases of dt as Mamba does, so that states remember more than a few tokens."""
    draw = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        if hasattr(layer, "mamba"):
            bias = layer.mamba.dt_proj.bias
            share = torch.rand(bias.shape, generator=draw)
            step = torch.exp(math.log(1e-3) + share * math.log(100))
            with torch.no_grad():
                bias.copy_(step + torch.log(-torch.expm1(-step)))
