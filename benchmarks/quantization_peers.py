"""Our schemes beside llama.cpp's types: bytes, and divergence from the unquantised model.

    python -m benchmarks.quantization_peers [--model DIR] [--text FILE.jsonl]
        [--calibrate FILE.jsonl] [--llama-cpp DIR] [--write docs/quantization.md]

The same weights, the same text and the same truth as in `quantization`. Both sides as they are
used: ours in bfloat16, with rows in 8 bits where the scheme allows it and the processor gains by
it; llama.cpp's with the activations that its kernels round. Bytes are those of the tensors.
Where ours are calibrated, so is llama.cpp's smallest but one, by its importance matrix of the same
pieces of text.
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
from jamba_lm.text.documents import PIECE_TOKENS, sample_sequences

TYPES = ("BF16", "Q8_0", "Q4_K_M", "Q4_0")
CALIBRATED_TYPE = "Q4_K_M"


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
    held_out: HeldOut,
    folder: Path,
    llama: llama_cpp.LlamaCpp,
    threads: int,
    other_text: Path | None,
) -> list[Damage]:
    """Measure every type of llama.cpp that users choose between."""
    values = sum(p.numel() for p in held_out.model.decoder.parameters())
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        # GGUF files are written beside the checkpoint.
        copied = Path(shutil.copytree(folder, place / "model"))
        files = {kind: llama_cpp.gguf_file(llama, copied, kind, threads) for kind in TYPES}
        if other_text is not None:
            calibrated = calibrated_file(llama, copied, files["BF16"], other_text, threads)
            files[f"{CALIBRATED_TYPE}, calibrated"] = calibrated
        for label, file in files.items():
            model = LlamaModel(llama, file, threads, place)
            found.append(held_out.damage(f"llama.cpp {label}", model, values, model.tensor_bytes()))
    return found


def calibrated_file(
    llama: llama_cpp.LlamaCpp, folder: Path, wide: Path, text: Path, threads: int
) -> Path:
    """Return a file that llama-quantize makes with an importance matrix, beside `wide`."""
    tokenizer = jamba_lm.load_tokenizer(folder)
    pieces = [tokenizer.decode(ids) for ids in sample_sequences(text, tokenizer)]
    sample, matrix = wide.with_name("sample.txt"), wide.with_name("sample.imatrix")
    sample.write_text("\n\n".join(pieces), encoding="utf-8")
    arguments = ["-m", wide, "-f", sample, "-o", matrix, "-c", PIECE_TOKENS, "-t", threads]
    llama.run("llama-imatrix", *arguments, threads=threads)
    out = wide.with_name(f"calibrated-{CALIBRATED_TYPE}.gguf")
    arguments = ["--imatrix", matrix, wide, out, CALIBRATED_TYPE, threads]
    llama.run("llama-quantize", *arguments, threads=threads)
    return out


def main() -> None:
    """Print the table and, with --write, put it into a document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded one by default")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="held-out documents, JSON Lines")
    parser.add_argument("--tokens", type=int, default=25_000, help="most tokens to score")
    parser.add_argument("--calibrate", type=Path, help="another text, to round 4 bits for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="folder where llama.cpp was built")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.model or jamba_lm.embedded_model_path()
    held_out = HeldOut(folder, options.text, options.tokens)
    llama = llama_cpp.find_or_build(options.llama_cpp)
    rows = by_scheme(held_out, folder, options.calibrate)
    rows += by_type(held_out, folder, llama, options.threads, options.calibrate)
    table = scheme_table(sorted(rows, key=lambda row: -(row.num_bytes or 0)))
    if options.write:
        rewrite(options.write, {"peers": table})
    print(table)


if __name__ == "__main__":
    main()
