"""What 8 and 4 bits cost a model: bytes, bits per byte and divergence, by scheme and by matrix.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --model DIR --text FILE.jsonl --calibrate OTHER.jsonl
        --write docs/quantization.md

Divergence is the mean over all tokens of KL(unquantised || quantised) of the next-token
distribution, in nats. The unquantised model computes in float32, so that the row "bf16" shows what
rounding activations to bfloat16 does by itself. The schemes are measured as they are used, in
bfloat16; single matrices and grids in float32, by weights that are rounded and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import jamba_lm
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.kernels.packed_weights import Int4Weight
from jamba_lm.language_model import LanguageModel
from jamba_lm.quantization.calibration import calibrate_decoder
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.policy import (
    Packing,
    Scheme,
    all_schemes,
    find_scheme,
    matrix_class,
)
from jamba_lm.quantization.rewrite import quantize_weight
from jamba_lm.text.documents import read_documents, sample_sequences

SAMPLE = Path(__file__).resolve().parents[1] / "tests" / "data" / "held_out.jsonl"
# Of every document, the first part: as many documents as the tokens allow.
DOCUMENT_CHARACTERS = 1600
# The logarithms of all probabilities of the unquantised model are kept: 1 GiB.
KEPT_PROBABILITIES = 2**28
CALL_TOKENS = 2048
KINDS = {
    "int8": Packing("int8"),
    "int4 by 64": Packing("int4", 64),
    "int4 by 32": Packing("int4", 32),
}
# Measured although no scheme packs them: this is why.
UNPACKED = {"router": "router.weight", "dt_proj": "dt_proj.weight"}
# What rows meet, experts included, by the last word of its name.
MATRICES = (
    *("gate_proj", "up_proj", "down_proj", "in_proj", "out_proj", "x_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "head"),
)
BEGIN, END = "<!-- table: {} begin -->", "<!-- table: {} end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What one change of the weights does.

    Attributes:
        name: which change.
        values: how many weights are rounded by it.
        num_bytes: of all weights, where that is the point.
        bits_per_byte: on the text.
        divergence: nats per token.
    """

    name: str
    values: int
    num_bytes: int | None
    bits_per_byte: float
    divergence: float


class Scorer(Protocol):
    """Whatever gives logits."""

    def logits(self, sequences: Sequence[Sequence[int]], /) -> Sequence[Tensor]:
        """Return the logits after each token of each sequence, [T, V]."""
        ...


class HeldOut:
    """A text, cut for scoring, and what the unquantised model says about it."""

    def __init__(self, folder: Path, text: Path, most_tokens: int) -> None:
        tokenizer = jamba_lm.load_tokenizer(folder)
        self.model = jamba_lm.load(folder, dtype="fp32")
        most = min(most_tokens, KEPT_PROBABILITIES // self.model.config.vocab_size)
        self.documents: list[list[int]] = []
        self.num_bytes = 0
        for document in read_documents(text):
            part = document[:DOCUMENT_CHARACTERS]
            ids = tokenizer.encode(part, add_bos=True)
            if sum(map(len, self.documents)) + len(ids) > most:
                break
            self.documents.append(ids)
            self.num_bytes += len(part.encode("utf-8"))
        self.targets = torch.tensor([one for ids in self.documents for one in ids[1:]])
        self.expected = list(self._log_probabilities(self.model))

    def _log_probabilities(self, model: Scorer) -> Iterator[Tensor]:
        """Yield log p of all tokens at every position, a call's positions at a time."""
        calls: list[list[list[int]]] = [[]]
        for ids in self.documents:
            if calls[-1] and sum(map(len, calls[-1])) + len(ids) > CALL_TOKENS:
                calls.append([])
            calls[-1].append(ids[:-1])
        for sequences in calls:
            yield torch.cat(list(model.logits(sequences))).log_softmax(-1)

    def damage(self, name: str, model: Scorer, values: int, num_bytes: int | None = None) -> Damage:
        """Measure a model of the same vocabulary."""
        nats, divergence, first = 0.0, 0.0, 0
        for expected, found in zip(self.expected, self._log_probabilities(model), strict=True):
            end = first + len(found)
            taken = found.gather(1, self.targets[first:end, None])
            nats -= float(taken.double().sum())
            divergence += float((expected.exp() * (expected - found)).double().sum())
            first = end
        return Damage(
            name=name,
            values=values,
            num_bytes=num_bytes,
            bits_per_byte=nats / math.log(2) / self.num_bytes,
            divergence=divergence / len(self.targets),
        )

    def rounded(
        self, name: str, names: Sequence[str], change: Callable[[str, Tensor], Tensor]
    ) -> Damage:
        """Measure the model with some of its weights changed, and put them back."""
        parameters = dict(self.model.decoder.named_parameters())
        before = {one: parameters[one].detach().clone() for one in names}
        with torch.no_grad():
            for one in names:
                parameters[one].copy_(change(one, before[one]))
            found = self.damage(name, self.model, sum(x.numel() for x in before.values()))
            for one in names:
                parameters[one].copy_(before[one])
        return found


def by_scheme(held_out: HeldOut, folder: Path, other_text: Path | None) -> list[Damage]:
    """Measure the unquantised model and every scheme, computing in bfloat16.

    Those with 4 bits once more as `jamba quantize --calibrate` rounds them for `other_text`.
    """
    found = []
    for label in ("bf16", *(scheme.label for scheme in all_schemes())):
        scheme = None if label == "bf16" else label
        model = jamba_lm.load(folder, dtype="bf16", quantize=scheme)
        values = sum(p.numel() for p in held_out.model.decoder.parameters())
        found.append(held_out.damage(label, model, values, model.weight_bytes))
        if scheme is not None and other_text is not None and find_scheme(scheme).group is not None:
            model = calibrated(folder, find_scheme(scheme), other_text)
            name = f"{label}, calibrated"
            found.append(held_out.damage(name, model, values, model.weight_bytes))
    return found


def calibrated(folder: Path, scheme: Scheme, text: Path) -> LanguageModel:
    """Return the model packed as `jamba quantize --calibrate` does it, in bfloat16."""
    model = jamba_lm.load(folder, dtype="bf16")
    sequences = sample_sequences(text, jamba_lm.load_tokenizer(folder))
    calibrate_decoder(model.decoder, scheme, sequences)
    return LanguageModel(model.config, model.decoder)


def by_matrix(held_out: HeldOut) -> list[Damage]:
    """Measure each class of matrix alone, in every type whose groups fit it."""
    classes: dict[str, list[str]] = {}
    shapes = {}
    for name, parameter in held_out.model.decoder.named_parameters():
        kind: str | None = matrix_class(name) or next(
            (label for label, ending in UNPACKED.items() if name.endswith(ending)), None
        )
        if kind is not None:
            classes.setdefault(kind, []).append(name)
            shapes[name] = parameter.shape
    return [
        held_out.rounded(
            f"{kind}, {label}",
            names,
            partial(search_grid, packing),
        )
        for kind, names in classes.items()
        for label, packing in KINDS.items()
        if packing.group is None or all(shapes[name][1] % packing.group == 0 for name in names)
    ]


def by_grid(held_out: HeldOut) -> list[Damage]:
    """Measure ways to choose the grid in 4 bits, on all matrices that the scheme int4 packs so."""
    scheme = next(scheme for scheme in all_schemes() if scheme.name == "int4")
    names = [
        name
        for name, parameter in held_out.model.decoder.named_parameters()
        if (packing := scheme.packing(name, parameter.shape)) is not None
        and packing.group is not None
    ]
    grids: dict[str, Callable[[str, Tensor], Tensor]] = {}
    for group in (64, 32):
        grids[f"range, by {group}"] = partial(range_grid, group)
        grids[f"search, by {group}"] = partial(search_grid, Packing("int4", group))
    grids["symmetric, by 32"] = partial(symmetric_grid, 32)
    return [held_out.rounded(label, names, grid) for label, grid in grids.items()]


def by_rows(held_out: HeldOut, folder: Path, scheme: Scheme) -> list[Damage]:
    """Measure rows rounded to 8 bits where they meet each kind of packed matrix."""
    rules: dict[str, Callable[[str], RowRounding]] = {
        "none": lambda name: RowRounding.NONE,
        **{one: partial(_only, one) for one in MATRICES},
        "all": lambda name: RowRounding.BY_ROW,
        f"as {scheme.label} has it": scheme.rounds_rows,
    }
    found = []
    for label, rounds in rules.items():
        model = jamba_lm.load(folder, dtype="bf16", quantize=scheme)
        values = 0
        for name, module in model.decoder.named_modules():
            if isinstance(module, PackedLinear):
                module.rows8 = rounds(f"{name}.weight")
                values += (module.rows8 != RowRounding.NONE) * math.prod(module.weight.shape)
        found.append(held_out.damage(label, model, values))
    return found


def _only(matrix: str, name: str) -> RowRounding:
    return RowRounding.BY_ROW if name.split(".")[-2] == matrix else RowRounding.NONE


def search_grid(packing: Packing, name: str, x: Tensor) -> Tensor:
    """Round as the schemes do."""
    return quantize_weight(name, x, packing).dequantize()


def range_grid(group: int, name: str, x: Tensor) -> Tensor:
    """Round to 16 steps from the smallest to the largest value of each group."""
    grouped = x.reshape(len(x), -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    return Int4Weight.on_grid(x, ((high - low) / 15).bfloat16(), low.bfloat16()).dequantize()


def symmetric_grid(group: int, name: str, x: Tensor) -> Tensor:
    """Round to -8 to 7 steps, the largest value of each group being -8: no minimum is stored."""
    grouped = x.reshape(len(x), -1, group)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).bfloat16().float()
    steps = (grouped / torch.where(scale != 0, scale, 1.0)).round().clamp(-8, 7)
    return (steps * scale).reshape(x.shape)


def scheme_table(rows: Sequence[Damage]) -> str:
    """Lay out what schemes cost, against the first row."""
    lines = [
        "| weights | bytes | bits a value | bits per byte | change | divergence |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        assert row.num_bytes is not None
        lines.append(
            f"| {row.name} | {row.num_bytes:,} | {8 * row.num_bytes / row.values:.2f} "
            f"| {row.bits_per_byte:.4f} | {_change(row, rows[0])} | {row.divergence:.2e} |"
        )
    return "\n".join(lines)


def damage_table(rows: Sequence[Damage], base: Damage) -> str:
    """Lay out what single changes do, and what that is for a million weights."""
    lines = [
        "| rounded | weights | change of bits per byte | divergence | per million weights |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.name} | {row.values:,} | {_change(row, base)} | {row.divergence:.1e} "
        f"| {f'{1e6 * row.divergence / row.values:.1e}' if row.values else ''} |"
        for row in rows
    ]
    return "\n".join(lines)


def _change(row: Damage, base: Damage) -> str:
    return f"{100 * (row.bits_per_byte / base.bits_per_byte - 1):+.3f} %"


def rewrite(path: Path, tables: dict[str, str]) -> None:
    """Put the tables between the marks of a document."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not begin or not end:
            raise SystemExit(f"{path} has no marks for the table {name!r}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded one by default")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="held-out documents, JSON Lines")
    parser.add_argument("--tokens", type=int, default=25_000, help="most tokens to score")
    parser.add_argument("--calibrate", type=Path, help="another text, to round 4 bits for")
    parser.add_argument("--schemes-only", action="store_true", help="leave the other tables out")
    parser.add_argument("--write", type=Path, help="put the tables into this document")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    folder = options.model or jamba_lm.embedded_model_path()
    held_out = HeldOut(folder, options.text, options.tokens)
    base = held_out.damage("fp32", held_out.model, 0)
    found = {"schemes": by_scheme(held_out, folder, options.calibrate)}
    if not options.schemes_only:
        found |= {
            "matrices": by_matrix(held_out),
            "grids": by_grid(held_out),
            **{
                f"rows {label}": by_rows(held_out, folder, find_scheme(label))
                for label in ("int8", "int4")
            },
        }
    tables = {
        # Rows are rounded in a model that is rounded already.
        name: damage_table(rows, rows[0] if name.startswith("rows") else base)
        for name, rows in found.items()
        if name != "schemes"
    }
    tables["schemes"] = scheme_table(found["schemes"])
    if options.write:
        rewrite(options.write, tables)
    if options.json:
        record = {
            "tokens": len(held_out.targets),
            "bytes": held_out.num_bytes,
            "torch": torch.__version__,
            **{name: [asdict(row) for row in rows] for name, rows in found.items()},
        }
        print(json.dumps(record, indent=2))
        return
    print(f"{len(held_out.documents)} documents, {len(held_out.targets):,} tokens\n")
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
