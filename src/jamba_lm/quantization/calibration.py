"""A finished decoder rewritten to packed weights that suit a text.

Layer by layer: the text goes through a layer, what its matrices meet is kept, each of them in 4
bits is rounded for that (`error_feedback.py`), and what the rounded layer gives is what the next
one is rounded for. Knows nothing of files.

M rows, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.kernels.packed_weights import PackedWeight
from jamba_lm.model.batch import Batch
from jamba_lm.model.call_arguments import require_ids
from jamba_lm.model.decoder import Decoder
from jamba_lm.quantization.error_feedback import quantize_int4_for
from jamba_lm.quantization.policy import Packing, Scheme
from jamba_lm.quantization.rewrite import (
    Progress,
    place_packed,
    planned_packings,
    quantize_weight,
    refuse_quantized,
    require_finite,
)

# Tokens that go through a layer at once, and one sequence more: what lies between its operations
# stays small beside what is kept.
CALL_TOKENS = 2048


def calibrate_decoder(
    decoder: Decoder,
    scheme: Scheme,
    sequences: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> None:
    """Replace the matrices that `scheme` packs, in place, with those in 4 bits rounded for a text.

    The layout and the bytes are those of `quantize_decoder`, and so is every matrix in 8 bits. Of
    one layer at a time the weights and all that its matrices meet are in memory in float32.

    Args:
        decoder: has values, and no packed module yet.
        scheme: which matrix becomes what; some of them 4 bits.
        sequences: token ids of texts like those that the model is for. An expert that none of them
            reaches is rounded without.
        progress: called with the values packed and the values in all, after every matrix.

    Raises:
        InputError: the decoder is quantised already, the scheme has nothing in 4 bits, an id is
            outside of the vocabulary, or there are no ids.
        CheckpointError: a matrix holds NaN or infinity, or the model makes such numbers of the
            text.
    """
    refuse_quantized(decoder)
    if scheme.group is None:
        raise InputError(
            f"scheme {scheme.name} has no matrix in 4 bits, and only those are rounded for a text: "
            "take int4, or leave the text out"
        )
    sequences = [list(ids) for ids in sequences if len(ids)]
    if not sequences:
        raise InputError("there is nothing to calibrate with: expected at least one token")
    flat = require_ids([one for ids in sequences for one in ids], decoder.config.vocab_size)
    packings = planned_packings(decoder, scheme)
    sizes = {name: decoder.get_parameter(name).numel() for name in packings}
    done, total = 0, sum(sizes.values())

    def place(name: str, packed: PackedWeight, dtype: torch.dtype) -> None:
        nonlocal done
        place_packed(decoder, name, packed, dtype, rows8=scheme.rounds_rows(name))
        done += sizes[name]
        if progress is not None:
            progress(done, total)

    dtype = decoder.final_norm.weight.dtype
    with torch.no_grad():
        for name in [one for one in packings if not one.startswith("blocks.")]:
            matrix = decoder.get_parameter(name).detach()
            place(name, quantize_weight(name, matrix, packings[name]), dtype)
        x_MD = decoder.embedding(torch.tensor(flat, dtype=torch.int64)).float()
        lengths = [len(ids) for ids in sequences]
        for index, block in enumerate(decoder.blocks):
            prefix = f"blocks.{index}."
            own = {name: one for name, one in packings.items() if name.startswith(prefix)}
            for name in own:
                require_finite(name, decoder.get_parameter(name).detach())
            with _in_float32(block):
                met = _rows_met(block, prefix, own, x_MD, lengths)
                for rows in chain.from_iterable(met.values()):
                    _require_numbers(index, rows)
                for name, packing in own.items():
                    matrix = decoder.get_parameter(name).detach()
                    place(name, _round(name, matrix, packing, met.pop(name, [])), dtype)
                x_MD = _through(block, x_MD, lengths)


def _require_numbers(layer: int, rows_MI: Tensor) -> None:
    if not torch.isfinite(rows_MI).all():
        raise CheckpointError(
            f"layer {layer} makes NaN or infinity of the text, for which nothing can be rounded: "
            "was the model saved after its training had diverged?"
        )


def _round(name: str, matrix: Tensor, packing: Packing, rows: list[Tensor]) -> PackedWeight:
    if packing.group is None or not rows:
        return quantize_weight(name, matrix, packing)
    return quantize_int4_for(matrix, torch.cat(rows), packing.group)


def _rows_met(
    block: nn.Module, prefix: str, own: dict[str, Packing], x_MD: Tensor, lengths: list[int]
) -> dict[str, list[Tensor]]:
    """Return what each matrix in 4 bits of a layer is multiplied with, in pieces [rows, inputs]."""
    met: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # Projections of the same rows are given one tensor, which is kept once.
        rows_MI = arguments[0].flatten(end_dim=-2)
        met.setdefault(name, []).append(rows_MI)

    hooks = []
    for name, module in block.named_modules():
        parameter = f"{prefix}{name}.weight"
        if parameter in own and own[parameter].group is not None:
            hooks.append(module.register_forward_pre_hook(partial(keep, parameter)))
    try:
        _through(block, x_MD, lengths)
    finally:
        for hook in hooks:
            hook.remove()
    return met


def _through(block: nn.Module, x_MD: Tensor, lengths: list[int]) -> Tensor:
    """Return what a layer makes of the rows of all sequences, some sequences at a time."""
    calls: list[list[int]] = [[]]
    for length in lengths:
        if calls[-1] and sum(calls[-1]) + length > CALL_TOKENS:
            calls.append([])
        calls[-1].append(length)
    pieces = x_MD.split([sum(call) for call in calls])
    found = [
        block(piece, Batch.of(call, None, None), None)
        for piece, call in zip(pieces, calls, strict=True)
    ]
    return torch.cat(found)


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """Compute in float32 for a while: no rounding of rows, and none of them twice among experts."""
    types = {name: one.dtype for name, one in block.named_parameters()}
    block.float()
    try:
        yield
    finally:
        for name, one in block.named_parameters():
            one.data = one.data.to(types[name])
