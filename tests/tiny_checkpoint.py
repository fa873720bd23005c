"""Tiny checkpoint folders, with weights, a tokenizer trained on a few sentences, and a template.

The weights are random: what such a model says is noise, and the same noise every time.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jamba_lm.config import JambaConfig
from tests.arms import shaken_model

SPECIAL_TOKENS = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|unk|>",
    "<|im_start|>",
    "<|im_end|>",
]
BOS_ID, EOS_ID, IM_END_ID = 1, 2, 5

TINY_TEXT = (
    "Once upon a time there was a river that ran through a quiet town.\n"
    "Every morning the children walked along the river and counted the boats.\n"
    "“Where do they go?” asked the youngest. Nobody knew, and 12 boats became 13.\n"
    "Das Mädchen aß einen Apfel. 猫は川を見ていた。🚤 went by, and the town was quiet again.\n"
)

CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config() -> JambaConfig:
    """Eight layers would be Jamba's own; four hold every kind of layer and are quick."""
    return JambaConfig(
        vocab_size=400,
        d_model=32,
        d_ff=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        attention_period=4,
        attention_offset=2,
        num_experts=4,
        experts_per_token=2,
        state_size=8,
        dt_rank=3,
        initializer_range=0.2,
        context_length=256,
    )


def write_tiny_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """Write tokenizer.json and its companions into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny_config().vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>" if chat_template is None else "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", settings)


def write_tiny_checkpoint(folder: Path, chat_template: str | None = None, seed: int = 0) -> Path:
    """Write a whole checkpoint: config, weights, tokenizer, generation settings."""
    eos_ids = (EOS_ID,) if chat_template is None else (EOS_ID, IM_END_ID)
    shaken_model(tiny_config().replace(eos_ids=eos_ids), seed=seed).save(folder)
    write_tiny_tokenizer(folder, chat_template)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": list(eos_ids), "pad_token_id": 0},
    )
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: it continues text and has no chat template."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of the ChatML family, which ends its answers with a stop token of their own."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny-chat") / "model", CHATML_TEMPLATE)
