"""Writes down what llama.cpp answered, for the tests, which cannot ask it.

Run by `python -m benchmarks.llama_cpp_parity --record`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.llama_cpp import RELEASE, LlamaCpp
from benchmarks.llama_cpp_probe import Probe
from jamba_lm.conversion import folder_to_gguf
from jamba_lm.gguf_file import BLOCK_TYPES, TYPE_CODES
from jamba_lm.gguf_output import TensorToWrite, write_gguf
from jamba_lm.presets import embedded_model_path
from jamba_lm.tensor_file import write_tensors
from tests.arms import shaken_model
from tests.checkpoint.gguf_models import (
    ANSWERS,
    BLOCKS,
    LOGITS,
    MODELS,
    Q4_K_M,
    SENTENCEPIECE,
    TEXTS,
    WIDE,
    model_folder,
    prompts,
)

COMMAND = "python -m benchmarks.llama_cpp_parity --record"
NEW_TOKENS = 32
ROWS, COLUMNS = 2, 256


def held_out_texts() -> list[str]:
    """Return the documents of the tests' held-out text."""
    path = ANSWERS.parents[1] / "held_out.jsonl"
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def digest(sequences: list[list[int]]) -> str:
    """Return a hash of many ids."""
    return hashlib.sha256(
        b"".join(array("i", [-1, *ids]).tobytes() for ids in sequences)
    ).hexdigest()


def record(llama: LlamaCpp, probe: Probe, folder: Path) -> None:
    """Ask llama.cpp, and write the files of `tests/data/llama_cpp`."""
    greedy: dict[str, list[list[int]]] = {}
    logits: dict[str, Tensor] = {}

    def ask(name: str, file: Path, asked: list[list[int]]) -> None:
        greedy[name] = probe.greedy(file, asked, NEW_TOKENS)
        logits.update({f"{name}: {i}": one for i, one in enumerate(probe.logits(file, asked))})

    for name, config in MODELS.items():
        file = folder / "model.gguf"
        folder_to_gguf(model_folder(name, folder / name), file, file_type="f32", overwrite=True)
        ask(name, file, prompts(config))
    wide, packed = folder / "wide.gguf", folder / "q4_k_m.gguf"
    shaken_model(WIDE, seed=3).save(folder / "wide")
    folder_to_gguf(folder / "wide", wide, file_type="f32")
    llama.run("llama-quantize", wide, packed, "Q4_K_M", 1, threads=1)
    shutil.copy(packed, Q4_K_M)
    ask("q4_k_m", packed, prompts(WIDE))

    demo, pieces = folder / "demo.gguf", folder / "pieces.gguf"
    folder_to_gguf(embedded_model_path(), demo, file_type="f32")
    vocabulary = folder / "sentencepiece"
    shaken_model(WIDE.replace(vocab_size=1500)).save(vocabulary)
    for path in SENTENCEPIECE.iterdir():
        shutil.copy(path, vocabulary / path.name)
    folder_to_gguf(vocabulary, pieces)
    files = {"byte-level": demo, "sentencepiece": pieces}
    prompt = probe.tokens(demo, ["The history of the city"])[0]
    answers = {
        "made by": COMMAND,
        "llama.cpp": f"in llama-cpp-python {RELEASE}",
        "tokens": {name: probe.tokens(file, TEXTS) for name, file in files.items()},
        "tokens of held_out.jsonl": {
            name: digest(probe.tokens(file, held_out_texts())) for name, file in files.items()
        },
        "tokens with control tokens": {
            name: probe.tokens(file, TEXTS, special=True) for name, file in files.items()
        },
        "greedy": greedy,
        "greedy of the embedded model": [prompt, probe.greedy(demo, [prompt], 2 * NEW_TOKENS)[0]],
    }
    ANSWERS.write_text(json.dumps(answers, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tensors(LOGITS, logits, {"made by": COMMAND})
    record_blocks(probe)


def record_blocks(probe: Probe) -> None:
    """Write a file with the same values in every type, and what ggml reads out of each."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    # Magnitudes of a factor of a hundred, and a row of one sign.
    values *= torch.logspace(-2, 0, COLUMNS)
    values[1] = values[1].abs()
    tensors = []
    plain = BLOCK_TYPES[TYPE_CODES["F32"]]
    for code, kind in BLOCK_TYPES.items():
        if kind.name in ("F32", "F16", "BF16"):
            continue
        packed, said = probe.blocks(code, values)
        shape = tuple(values.shape)
        tensors += [
            TensorToWrite(kind.name, kind, shape, [packed].copy),
            TensorToWrite(f"{kind.name} read", plain, shape, [said.numpy().tobytes()].copy),
        ]
    write_gguf(BLOCKS, {"general.description": ("string", f"made by {COMMAND}")}, tensors)
