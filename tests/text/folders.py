"""Tokenizer folders of every kind that a Jamba may come with, trained on a few lines.

AI21's own files are not shipped here. The two chat templates are our reconstructions of the formats
that Jamba 1.5 to 1.7 (`<|bom|>`) and Jamba Reasoning and Jamba2 (ChatML with `<think>` and
`<tool_call>`) are described to use: good for testing templates of such a shape, not a source of
the exact text that those models were tuned on.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from jamba_lm.text.tokenizer_training import TokenizerRecipe, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# Deleted when the process ends.
_FOLDERS = tempfile.TemporaryDirectory(prefix="jamba-tokenizers-")

SAMPLE = (ROOT / "LICENSE").read_text(
    encoding="utf-8"
) + "Das Mädchen aß 12 Äpfel. 猫は川を見ていた。🚤 Ελληνικά, עברית, हिन्दी.\n\tif x == 3:\r\n" * 8

BOM_TOKENS = ("<|bom|>", "<|eom|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
BOM_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|bom|><|system|> You may call these tools: ' + tools|tojson + '<|eom|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|bom|><|' + message['role'] + '|> ' }}
{%- if message['content'] is string %}{{- message['content']|trim }}{% endif %}
{%- if message.tool_calls %}
{{- '<tool_calls>' + message.tool_calls|map(attribute='function')|list|tojson + '</tool_calls>' }}
{%- endif %}
{{- '<|eom|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|bom|><|assistant|>' }}{% endif %}"""

THINK_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
THINK_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content %}
            {#- Old thoughts are left out: only what was said is kept. #}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}{% endif %}
{%- endif %}"""

FAMILIES = ("bom", "think")
KINDS = ("byte-level", "byte-fallback")
# With a dummy space in front of the text, as Llama 2 and Mistral have it: not Jamba's way, but a
# folder may hold one.
METASPACE_KINDS = ("prepend", "first")


@cache
def trained_folder(kind: str) -> Path:
    """Return a folder with a tokenizer of one of the `KINDS`."""
    text = Path(_FOLDERS.name) / "sample.txt"
    text.write_text(SAMPLE, encoding="utf-8", newline="")
    out = Path(_FOLDERS.name) / kind
    train_tokenizer([text], out, TokenizerRecipe(vocab_size=700, kind=kind), hold_out=False)
    return out


def family_folder(family: str, kind: str = "byte-level") -> Path:
    """Return a folder with one family's tokens, template and stop ids."""
    return _family_folder(family, kind)


@cache
def _family_folder(family: str, kind: str) -> Path:
    text = Path(_FOLDERS.name) / "sample.txt"
    text.write_text(SAMPLE, encoding="utf-8", newline="")
    out = Path(_FOLDERS.name) / f"{family}-{kind}"
    specials = BOM_TOKENS if family == "bom" else THINK_TOKENS
    recipe = TokenizerRecipe(vocab_size=700, kind=kind, specials=specials)
    train_tokenizer([text], out, recipe, hold_out=False)

    settings = read(out / "tokenizer_config.json")
    settings["chat_template"] = BOM_TEMPLATE if family == "bom" else THINK_TEMPLATE
    write(out / "tokenizer_config.json", settings)
    document = read(out / "tokenizer.json")
    for token in document["added_tokens"]:
        # As in the wild: markup for thoughts and calls is added, but not special.
        token["special"] = token["content"] not in THINK_TOKENS
    write(out / "tokenizer.json", document)
    stop = document["model"]["vocab"]["<|eom|>" if family == "bom" else "<|im_end|>"]
    write(out / "generation_config.json", {"eos_token_id": [2, stop], "pad_token_id": 0})
    write(out / "config.json", {"eos_token_id": [2, stop], "bos_token_id": 1, "vocab_size": 700})
    return out


@cache
def metaspace_folder(kind: str) -> Path:
    """Return a folder with a SentencePiece-like tokenizer that has a dummy space in front."""
    tokenizer = LibraryTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>"]
    bytes_256 = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*specials, *bytes_256], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE.splitlines(), trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in specials]
    out = Path(_FOLDERS.name) / f"metaspace-{kind}"
    out.mkdir()
    write(out / "tokenizer.json", document)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    write(out / "tokenizer_config.json", settings | {"eos_token": "</s>", "unk_token": "<unk>"})
    return out


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

EVERY_FOLDER = {
    **{f"trained {kind}": (trained_folder, kind) for kind in KINDS},
    **{f"family {family}": (family_folder, family) for family in FAMILIES},
    **{f"metaspace {kind}": (metaspace_folder, kind) for kind in METASPACE_KINDS},
}
every_folder = pytest.mark.parametrize("name", EVERY_FOLDER)
jamba_folders = pytest.mark.parametrize("name", [n for n in EVERY_FOLDER if "meta" not in n])


def folder_of(name: str) -> Path:
    """Return the folder of this name in `EVERY_FOLDER`."""
    make, argument = EVERY_FOLDER[name]
    return make(argument)


@cache
def loaded(name: str) -> Tokenizer:
    """Return the tokenizer of this name in `EVERY_FOLDER`."""
    return load_tokenizer(folder_of(name))


def written(folder: Path, name: str, data: bytes | str) -> Path:
    """Write a file, text as UTF-8, and return its path."""
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
