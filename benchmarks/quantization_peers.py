"""Our schemes beside llama.cpp's types: bytes, and divergence from the unquantised model.

    python -m benchmarks.quantization_peers [--model DIR] [--text FILE.jsonl] [--llama-cpp DIR]
        [--write docs/quantization.md]

The same weights, the same text and the same truth as in `quantization`. Both sides as they are
used: ours in bfloat16, with rows in 8 bits where the scheme allows it and the processor gains by
it; llama.cpp's with the activations that its kernels round. Bytes are those of the tensors.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader
from torch import Tensor

import jamba_lm
from benchmarks import llama_cpp
from benchmarks.quantization import SAMPLE, Damage, HeldOut, by_scheme, rewrite, scheme_table

TYPES = ("BF16", "Q8_0", "Q4_K_M", "Q4_0")


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """A GGUF file, asked through llama.cpp."""

    llama: llama_cpp.LlamaCpp
    file: Path
    threads: int
    place: Path

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits after each token of each sequence, [T, V]."""
        return [self.llama.logits(self.file, ids, self.threads, self.place) for ids in sequences]

    def tensor_bytes(self) -> int:
        """Return the bytes of all tensors, without the header and the tokenizer."""
        return sum(int(tensor.n_bytes) for tensor in GGUFReader(self.file).tensors)


def by_type(
    held_out: HeldOut, folder: Path, llama: llama_cpp.LlamaCpp, threads: int
) -> list[Damage]:
    """Measure every type of llama.cpp that users choose between."""
    values = sum(p.numel() for p in held_out.model.decoder.parameters())
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        # GGUF files are written beside the checkpoint.
        copied = Path(shutil.copytree(folder, place / "model"))
        for kind in TYPES:
            file = llama_cpp.gguf_file(llama, copied, kind, threads)
            model = LlamaModel(llama, file, threads, place)
            label = f"llama.cpp {kind}"
            found.append(held_out.damage(label, model, values, model.tensor_bytes()))
    return found


def main() -> None:
    """Print the table and, with --write, put it into a document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded one by default")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="held-out documents, JSON Lines")
    parser.add_argument("--tokens", type=int, default=25_000, help="most tokens to score")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="folder where llama.cpp was built")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.model or jamba_lm.embedded_model_path()
    held_out = HeldOut(folder, options.text, options.tokens)
    llama = llama_cpp.find_or_build(options.llama_cpp)
    rows = by_scheme(held_out, folder) + by_type(held_out, folder, llama, options.threads)
    table = scheme_table(sorted(rows, key=lambda row: -(row.num_bytes or 0)))
    if options.write:
        rewrite(options.write, {"peers": table})
    print(table)


if __name__ == "__main__":
    main()
