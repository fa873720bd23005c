"""The same models here and in llama.cpp: tokens, logits, continuations and stored values.

Writes GGUF files of the embedded model and of small random ones, lets llama.cpp answer, lets
llama-quantize make its own types of them, and reads those back. Differences are the largest one in
any logit, as a share of the largest logit. llama.cpp rounds activations to the type of the weights
(to 8 bits for quantised ones), and only there may the two differ by more than float32 does.

    python -m benchmarks.llama_cpp_parity [--llama-cpp DIR] [--json]
    python -m benchmarks.llama_cpp_parity [--llama-cpp DIR] --record    # what tests/data holds
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llama_cpp import LlamaCpp, find_or_build
from benchmarks.llama_cpp_answers import held_out_texts, record
from benchmarks.llama_cpp_probe import Probe
from jamba_lm.checkpoint.gguf_reader import GgufWeights
from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.conversion import folder_to_gguf
from jamba_lm.gguf_file import GgufFile
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.presets import embedded_model_path
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from tests.arms import SMALL
from tests.checkpoint.gguf_models import (
    MARKED,
    MODELS,
    SENTENCEPIECE,
    TEXTS,
    model_folder,
    prompts,
)

WRITTEN = ("f32", "f16", "bf16", "q8_0", "q4_0")
# What llama-quantize makes; its rows of 256 values fit the embedded model.
QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_XS")
NEW_TOKENS = 48
PIECE_CHARACTERS = 2000
PYTHON_FILES = 150


def sample_texts() -> Iterator[tuple[str, str]]:
    """Yield real text in pieces, with what it is: speeches, source code, other scripts."""
    texts = [("English", text) for text in held_out_texts()]
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:PYTHON_FILES]
    texts += [("Python", path.read_text(encoding="utf-8")) for path in library]
    texts += [("odd", text) for text in TEXTS] + [("combining marks", MARKED)]
    for kind, text in texts:
        for place in range(0, len(text), PIECE_CHARACTERS):
            yield kind, text[place : place + PIECE_CHARACTERS]


def token_parity(probe: Probe, file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Compare the tokens of every piece of text, by kind of text."""
    pieces = list(sample_texts())
    theirs = probe.tokens(file, [text for _, text in pieces])
    found: dict[str, dict[str, int]] = {}
    for (kind, text), ids in zip(pieces, theirs, strict=True):
        counts = found.setdefault(kind, {"bytes": 0, "tokens": 0, "pieces": 0, "different": 0})
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids)
        counts["pieces"] += 1
        counts["different"] += tokenizer.encode(text, add_bos=False) != ids
    return found


def greedy_tokens(model: LanguageModel, prompt: Sequence[int], count: int) -> list[int]:
    """Continue a prompt by the likeliest token each time, whatever it is."""
    state, ids, found = model.new_state(), list(prompt), list[int]()
    while len(found) < count:
        ids = [int(model.next_logits([ids], [state])[0].argmax())]
        found += ids
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, as a share of the largest expected logit."""
    scale = max(float(one.abs().max()) for one in expected)
    pairs = zip(found, expected, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / scale


def answer_parity(probe: Probe, file: Path) -> dict[str, Any]:
    """Compare logits and greedy continuations of one file, read by both."""
    model = load(file, dtype="fp32")
    asked = prompts(model.config)
    theirs = probe.greedy(file, asked, NEW_TOKENS)
    ours = [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in asked]
    return {
        "logits": difference(model.logits(asked), probe.logits(file, asked)),
        "same greedy tokens": sum(
            a == b
            for one, other in zip(ours, theirs, strict=True)
            for a, b in zip(one, other, strict=True)
        ),
        "of": NEW_TOKENS * len(asked),
    }


def quantized_parity(
    llama: LlamaCpp, probe: Probe, source: Path, kind: str, folder: Path
) -> dict[str, Any]:
    """Let llama-quantize make a type; compare every value with llama.cpp's own decoding of it."""
    packed, decoded = folder / f"{kind}.gguf", folder / f"{kind}-f32.gguf"
    llama.run("llama-quantize", source, packed, kind, 1, threads=1)
    llama.run("llama-quantize", "--allow-requantize", packed, decoded, "F32", 1, threads=1)
    ours, theirs = GgufWeights(GgufFile(packed), "fp32"), GgufWeights(GgufFile(decoded), "fp32")
    asked = prompts(ours.config)
    different = sum(not torch.equal(ours[own], theirs[own]) for own in ours)
    stored = {place.kind.name for place in GgufFile(packed).tensors.values()}
    return {
        "types": sorted(stored),
        "tensors": len(ours),
        "different tensors": different,
        "decoded logits": difference(
            load(packed, dtype="fp32").logits(asked), probe.logits(decoded, asked)
        ),
        **answer_parity(probe, packed),
    }


def measure(llama: LlamaCpp, folder: Path) -> dict[str, Any]:
    """Run every comparison."""
    probe = Probe(llama)
    found: dict[str, Any] = {"tokens": {}, "written here": {}, "written by llama-quantize": {}}
    demo = folder / "demo.gguf"
    folder_to_gguf(embedded_model_path(), demo, file_type="f32")
    found["tokens"]["byte-level (embedded model)"] = token_parity(
        probe, demo, load_tokenizer(embedded_model_path())
    )
    pieces = folder / "sentencepiece"
    write_random_checkpoint(pieces, SMALL.replace(vocab_size=1500))
    for path in SENTENCEPIECE.iterdir():
        shutil.copy(path, pieces / path.name)
    file = folder / "sentencepiece.gguf"
    folder_to_gguf(pieces, file)
    found["tokens"]["SentencePiece"] = token_parity(probe, file, load_tokenizer(pieces))
    sources = {"embedded model": embedded_model_path()} | {
        name: model_folder(name, folder / name) for name in MODELS
    }
    for name, source in sources.items():
        for file_type in WRITTEN:
            out = folder / "written.gguf"
            folder_to_gguf(source, out, file_type=file_type, overwrite=True)
            found["written here"][f"{name}, {file_type}"] = answer_parity(probe, out)
    for kind in QUANTIZED:
        found["written by llama-quantize"][kind] = quantized_parity(
            llama, probe, demo, kind, folder
        )
    return found


def show(found: dict[str, Any]) -> None:
    """Print the comparisons as three tables."""
    for family, kinds in found["tokens"].items():
        for kind, counts in kinds.items():
            print(
                f"tokens, {family}, {kind}: {counts['different']} of {counts['pieces']:,} pieces "
                f"differ ({counts['bytes']:,} bytes, {counts['tokens']:,} tokens)"
            )
    for name, one in found["written here"].items():
        print(
            f"{name}: logits within {one['logits']:.1e}, greedy tokens "
            f"{one['same greedy tokens']} of {one['of']} the same"
        )
    for kind, one in found["written by llama-quantize"].items():
        print(
            f"llama-quantize {kind} ({', '.join(one['types'])}): {one['different tensors']} of "
            f"{one['tensors']} weights differ; logits within {one['decoded logits']:.1e} of "
            f"llama.cpp on the decoded file, {one['logits']:.1e} on the file itself, greedy tokens "
            f"{one['same greedy tokens']} of {one['of']} the same"
        )


def main() -> None:
    """Measure, or record what the tests compare with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="where it was built before")
    parser.add_argument("--record", action="store_true", help="renew the answers in tests/data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    llama = find_or_build(options.llama_cpp)
    with tempfile.TemporaryDirectory() as temporary:
        if options.record:
            record(llama, Probe(llama), Path(temporary))
            return
        found = measure(llama, Path(temporary))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
