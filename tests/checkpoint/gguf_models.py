"""The models, prompts and texts that llama.cpp was asked about, and where its answers are.

`python -m benchmarks.llama_cpp_parity --record` asks it again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from jamba_lm.config import JambaConfig
from tests.arms import SMALL, shaken_model

FOLDER = Path(__file__).resolve().parents[1] / "data" / "llama_cpp"
ANSWERS = FOLDER / "answers.json"
LOGITS = FOLDER / "logits.safetensors"
# Values in each type of ggml, and what ggml reads out of them again.
BLOCKS = FOLDER / "blocks.gguf"
# A model that llama-quantize made, with the types that it mixes.
Q4_K_M = FOLDER / "q4_k_m.gguf"
# Trained by the sentencepiece library, on English and Python, no space put in front.
SENTENCEPIECE = FOLDER / "sentencepiece"

MODELS: dict[str, JambaConfig] = {
    "experts": SMALL,
    "experts, tied": SMALL.replace(tie_embeddings=True, num_kv_heads=1),
    "dense": SMALL.replace(num_experts=1),
    "dense, tied, attention first": SMALL.replace(
        num_experts=1, tie_embeddings=True, attention_period=2, attention_offset=0
    ),
    "odd sizes": SMALL.replace(
        vocab_size=61, d_model=24, d_ff=20, state_size=8, conv_width=3, dt_rank=5, num_layers=3
    ),
}
# Rows of 256 values, for the types whose blocks are so long, and as few of them as can be.
WIDE = SMALL.replace(
    vocab_size=32,
    d_model=256,
    d_ff=32,
    num_layers=2,
    num_experts=2,
    attention_period=2,
    attention_offset=1,
    dt_rank=8,
    state_size=8,
    initializer_range=0.06,
)

TEXTS = (
    "Hello, world! It's 12:30; they'll come at 1999-12-31.",
    "def main(args: list[str]) -> int:\n    return len(args) // 2  # 'quoted' \"text\"\n",
    "'something' and 'Tis and don't and 'SOMETHING' and you'd've",
    "  two spaces,   three,\ttabs\t\tand\n\n\nlines  \n  ",
    "Das Mädchen aß einen Apfel. Où est la bibliothèque? ñandú",
    "猫は川を見ていた。Привет, мир! שלום مرحبا ٣٤٥ ½ ² Ⅷ",
    "🚤 and 👩‍👩‍👧 and ★★★ → ∑∫ €100 #hash @name C++ <|im_end|> <b>",
    "-----===== ... !!! ??? (((nested))) [[x]] {{y}} a_b_c __init__ 0x7fFF 3.14e-10",
    "\r\nwindows\r\nlines\r\n and\u00a0no-break\u2003em space\u200bzero width",
)
# Accents as characters of their own: the one kind of text that llama.cpp cuts otherwise.
MARKED = "cafe\u0301 nai\u0308ve हिन्दी ❤️ ภาษาไทย"


def model_folder(name: str, folder: Path) -> Path:
    """Write one of the models, and return its folder."""
    shaken_model(MODELS[name], seed=3).save(folder)
    return folder


def prompts(config: JambaConfig) -> list[list[int]]:
    """Return three prompts for a model of this shape: one token, a few, and some dozens."""
    draw = torch.Generator().manual_seed(5)
    return [
        torch.randint(config.vocab_size, (length,), generator=draw).tolist()
        for length in (1, 7, 40)
    ]
