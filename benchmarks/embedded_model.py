"""Bits per byte of the embedded model on held-out text, beside `xz -9` and a trigram byte model.

    python -m benchmarks.embedded_model
    python -m benchmarks.embedded_model --corpus corpus/demo

The first reads the sample of held-out documents in tests/data; the second all of them, and counts
the trigrams of the training text anew. All three are given the same bytes; xz gets every document
in one file, since it has no training text to learn from.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import jamba_lm
from benchmarks.byte_trigram import ByteTrigram
from jamba_lm.evaluation.scoring import score_blocks
from jamba_lm.text.documents import read_documents

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
SAMPLE = DATA / "held_out.jsonl"
TRIGRAMS = DATA / "training_trigrams.safetensors"
# Documents up to this size make the sample.
SAMPLE_DOCUMENT_BYTES = 16_500


def model_bits(folder: Path, texts: Sequence[str], context_tokens: int) -> float:
    """Return the bits the model in `folder` needs for the documents, each from an empty state."""
    model = jamba_lm.load(folder)
    tokenizer = jamba_lm.load_tokenizer(folder)
    total = 0.0
    for text in texts:
        block = (tokenizer.encode(text, add_bos=False), len(text.encode("utf-8")))
        score = score_blocks(
            model,
            [block],
            bos_id=tokenizer.bos_id,
            piece_tokens=min(context_tokens, 512),
            context_tokens=context_tokens,
        )
        total += score.bits_per_byte * score.num_bytes
    return total


def xz_bits(texts: Sequence[str]) -> float:
    """Return the size of all documents in one file after `xz -9e`, headers left out."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    data = "\n\n".join(texts).encode("utf-8")
    return 8.0 * len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


def compare(
    folder: Path, texts: Sequence[str], trigram: ByteTrigram, context_tokens: int
) -> dict[str, float]:
    """Return bits per byte by method, on the same documents."""
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    bits = {
        "embedded model": model_bits(folder, texts, context_tokens),
        "trigram byte model": sum(trigram.bits(text.encode("utf-8")) for text in texts),
        "xz -9e": xz_bits(texts),
    }
    return {name: value / num_bytes for name, value in bits.items()}


def write_sample(corpus: Path) -> None:
    """Write the sample of held-out documents and the trigrams of the training text."""
    DATA.mkdir(parents=True, exist_ok=True)
    lines = (corpus / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [
        line
        for line in lines
        if len(json.loads(line)["text"].encode("utf-8")) <= SAMPLE_DOCUMENT_BYTES
    ]
    SAMPLE.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    trigram_of(corpus).save(TRIGRAMS)


def trigram_of(corpus: Path) -> ByteTrigram:
    """Count the trigrams of the training text."""
    texts = read_documents(corpus / "train.jsonl")
    return ByteTrigram.of_texts(text.encode("utf-8") for text in texts)


def table(found: Mapping[str, float], num_documents: int, num_bytes: int) -> str:
    """Lay the comparison out as a Markdown table."""
    lines = [
        f"| {num_documents} held-out documents, {num_bytes:,} bytes | bits per byte |",
        "| --- | ---: |",
        *(f"| {name} | {value:.3f} |" for name, value in found.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded one by default")
    parser.add_argument("--corpus", type=Path, help="folder that recipes/demo_corpus.py wrote")
    parser.add_argument("--context", type=int, default=512, help="tokens before a fresh start")
    parser.add_argument("--write-sample", action="store_true", help="renew tests/data, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.write_sample:
        write_sample(options.corpus or Path("corpus/demo"))
        return
    texts = list(read_documents(options.corpus / "validation.jsonl" if options.corpus else SAMPLE))
    trigram = trigram_of(options.corpus) if options.corpus else ByteTrigram.load(TRIGRAMS)
    folder = options.model or jamba_lm.embedded_model_path()
    found = compare(folder, texts, trigram, options.context)
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if options.json:
        record = {
            "documents": len(texts),
            "bytes": num_bytes,
            "context_tokens": options.context,
            "torch": torch.__version__,
            "bits_per_byte": found,
        }
        print(json.dumps(record, indent=2))
        return
    print(table(found, len(texts), num_bytes))


if __name__ == "__main__":
    main()
