"""Trains the SentencePiece tokenizer that the tests hold against llama.cpp.

On English and on Python's own library, so another release of Python gives another one. Needs the
package `sentencepiece`, which nothing else here does.

    python -m benchmarks.sentencepiece_tokenizer [FOLDER]
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from sentencepiece import (  # type: ignore[import-not-found, unused-ignore]
    SentencePieceProcessor,
    SentencePieceTrainer,
)

from benchmarks.llama_cpp_answers import held_out_texts
from tests.checkpoint.gguf_models import SENTENCEPIECE

ENTRIES, LINES = 1500, 60_000
SPECIAL = {"pad": "<|pad|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|unk|>"}
CONTROLS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
# So that letters beyond ASCII get entries of their own.
ACCENTED = [
    "Das Mädchen aß einen Apfel. 猫は川を見ていた。",
    "Où est la bibliothèque? Größe, naïve, façade",
]


def train(folder: Path) -> Any:
    """Return a trained model: BPE, no space in front, digits apart, bytes for rare characters."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[60:160]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in library]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    lines += [line for text in held_out_texts() for line in text.split("\n") if line.strip()]
    random.Random(0).shuffle(lines)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines[:LINES] + ACCENTED * 20), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "model"),
        model_type="bpe",
        vocab_size=ENTRIES,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        control_symbols=CONTROLS,
        num_threads=1,
        **{f"{role}_id": index for index, role in enumerate(SPECIAL)},
        **{f"{role}_piece": name for role, name in SPECIAL.items()},
    )
    return SentencePieceProcessor(model_file=str(folder / "model.model"))


def tokenizer_json(pieces: list[str]) -> dict[str, Any]:
    """Return a tokenizer.json as transformers makes it of such a model, pieces in order."""
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:place], piece[place:]) for place in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        # Pieces are in the order in which they were merged.
        merges += sorted(known, key=lambda pair: (len(pair[0]), len(pair[1])))
    controls = {*SPECIAL.values(), *CONTROLS}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"String": "▁"}
    bos = SPECIAL["bos"]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[piece], "content": piece, **plain, "special": True}
            for piece in pieces
            if piece in controls
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": space, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def main(target: Path) -> None:
    """Train, and write the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        model = train(Path(temporary))
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    settings = {f"{role}_token": SPECIAL[role] for role in ("bos", "eos", "pad", "unk")}
    target.mkdir(parents=True, exist_ok=True)
    document = json.dumps(tokenizer_json(pieces), ensure_ascii=False, separators=(",", ":"))
    (target / "tokenizer.json").write_text(document + "\n", encoding="utf-8")
    more = {"add_bos_token": True, "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(
        json.dumps(settings | more, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SENTENCEPIECE)
