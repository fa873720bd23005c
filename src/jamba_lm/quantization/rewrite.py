"""A finished decoder rewritten to packed weights, and back; and what such a decoder is made of.

Works module by module and lets go of each original before the next. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.kernels.packed_weights import Int8Weight, PackedWeight
from jamba_lm.model.decoder import Decoder
from jamba_lm.quantization.grid import quantize_int4
from jamba_lm.quantization.linear import PackedEmbedding, PackedLinear
from jamba_lm.quantization.policy import Packing, Scheme, all_schemes

Progress = Callable[[int, int], None]
PACKED = (PackedLinear, PackedEmbedding)


def quantize_decoder(decoder: Decoder, scheme: Scheme, progress: Progress | None = None) -> None:
    """Replace the matrices that `scheme` packs, in place.

    Args:
        decoder: has values, and no packed module yet.
        scheme: which matrix becomes what.
        progress: called with the values packed and the values in all, after every matrix.

    Raises:
        InputError: the decoder is quantised already.
        CheckpointError: a matrix holds NaN or infinity.
    """
    refuse_quantized(decoder)
    packings = planned_packings(decoder, scheme)
    sizes = {name: decoder.get_parameter(name).numel() for name in packings}
    done, total = 0, sum(sizes.values())
    for name, packing in packings.items():
        matrix = decoder.get_parameter(name)
        packed = quantize_weight(name, matrix.detach(), packing)
        place_packed(decoder, name, packed, matrix.dtype, rows8=scheme.rounds_rows(name))
        del matrix
        done += sizes[name]
        if progress is not None:
            progress(done, total)


def refuse_quantized(decoder: Decoder) -> None:
    """Refuse to pack a decoder a second time.

    Raises:
        InputError: one of its modules is packed.
    """
    if any(isinstance(module, PACKED) for module in decoder.modules()):
        raise InputError(
            "the model is quantised already: start from the original one, since rounding twice "
            "loses more"
        )


def planned_packings(decoder: Decoder, scheme: Scheme) -> dict[str, Packing]:
    """Return which parameters of a plain decoder `scheme` packs, and how."""
    # Names only: a list of the parameters would keep all of them alive.
    return {
        name: packing
        for name, parameter in decoder.named_parameters()
        if (packing := scheme.packing(name, parameter.shape)) is not None
    }


def dequantize_decoder(
    decoder: Decoder, dtype: torch.dtype | None = None, *, layers: bool = True
) -> None:
    """Put plain matrices back, in place: what the packed ones stand for, rounded to `dtype`.

    Args:
        decoder: may be quantised or not.
        dtype: of these matrices; that of the model's other weights when None.
        layers: also those inside the layers; otherwise embedding and head alone.
    """
    dtype = decoder.final_norm.weight.dtype if dtype is None else dtype
    for name, module in list(decoder.named_modules()):
        if isinstance(module, PACKED) and (layers or not name.startswith("blocks.")):
            if name == "head" and decoder.config.tie_embeddings:
                decoder.head = None
                continue
            _replace(decoder, name, _plain(module, dtype))


class PlainWeights(Mapping[str, Tensor]):
    """A decoder's parameters as if it had never been packed, each made when it is asked for.

    What packed matrices stand for comes in float32; the rest in its own type.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        with torch.device("meta"):
            blank = Decoder(decoder.config)
        self._names = [name for name, _ in blank.named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = self._decoder.get_submodule(owner)
        if isinstance(module, PACKED) and leaf == "weight":
            return module.weight.dequantize()
        return self._decoder.get_parameter(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def quantize_weight(name: str, weight: Tensor, packing: Packing) -> PackedWeight:
    """Round one matrix `[O, I]`, of any float dtype.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    require_finite(name, weight)
    if packing.group is None:
        return Int8Weight.quantize(weight)
    return quantize_int4(weight, packing.group)


def require_finite(name: str, weight: Tensor) -> None:
    """Refuse a matrix that cannot be rounded to integers.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{name} holds NaN or infinity, which cannot be rounded to integers: "
            "was the model saved after its training had diverged?"
        )


def place_packed(
    decoder: Decoder,
    name: str,
    weight: PackedWeight,
    dtype: torch.dtype,
    *,
    rows8: RowRounding,
) -> None:
    """Put a packed matrix in the place of the parameter `name`; a tied head shares it.

    Args:
        decoder: its matrix may be on the meta device.
        name: the parameter's.
        weight: of its shape.
        dtype: that an embedding returns rows in.
        rows8: see `PackedLinear`.
    """
    path = name.removesuffix(".weight")
    module = decoder.get_submodule(path)
    if isinstance(module, nn.Embedding):
        _replace(decoder, path, PackedEmbedding(weight, dtype))
        if decoder.config.tie_embeddings:
            decoder.head = PackedLinear(weight)  # type: ignore[assignment]
    else:
        assert isinstance(module, nn.Linear), path
        _replace(decoder, path, PackedLinear(weight, module.bias, rows8=rows8))


def use_backend(decoder: Decoder, backend: str | None) -> None:
    """Make the packed modules of a decoder compute with the back-end of this name."""
    for module in decoder.modules():
        if isinstance(module, PackedLinear):
            module.backend = backend


def stored_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a decoder's weights are made of, each once, with its name.

    A packed matrix `x.weight` gives `x.weight.values` and so on; all else is a parameter.
    """
    tied = decoder.config.tie_embeddings
    for name, module in decoder.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PACKED) and not (tied and name == "head"):
            for part, tensor in module.weight.tensors().items():
                yield f"{prefix}weight.{part}", tensor
        for leaf, parameter in module.named_parameters(recurse=False):
            yield prefix + leaf, parameter


def scheme_of(decoder: Decoder) -> Scheme | None:
    """Return the scheme that a decoder's modules follow, or None when none is packed.

    Raises:
        ValueError: they follow none: single modules were replaced by hand.
    """
    found = {
        f"{name}.weight": module.weight
        for name, module in decoder.named_modules()
        if isinstance(module, PACKED) and not (name == "head" and decoder.config.tie_embeddings)
    }
    if not found:
        return None
    packings = {name: packing_of(weight) for name, weight in found.items()}
    shapes: dict[str, tuple[int, ...]] = {name: weight.shape for name, weight in found.items()}
    shapes |= {name: tuple(one.shape) for name, one in decoder.named_parameters()}
    for scheme in all_schemes():
        wanted = {name: scheme.packing(name, shape) for name, shape in shapes.items()}
        if packings == {name: one for name, one in wanted.items() if one is not None}:
            return scheme
    raise ValueError("the decoder's packed modules follow no scheme of quantization/policy.py")


def packing_of(weight: PackedWeight) -> Packing:
    """Return how a packed weight is kept."""
    if isinstance(weight, Int8Weight):
        return Packing("int8")
    return Packing("int4", weight.group)


def _plain(module: PackedLinear | PackedEmbedding, dtype: torch.dtype) -> nn.Module:
    matrix = nn.Parameter(module.weight.dequantize(dtype))
    outputs, inputs = module.weight.shape
    plain: nn.Module
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            plain = nn.Embedding.from_pretrained(torch.empty(outputs, inputs), freeze=False)
        else:
            plain = nn.Linear(inputs, outputs, bias=False)
            plain.register_parameter("bias", module.bias)
    plain.weight = matrix
    return plain


def _replace(decoder: Decoder, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, module)
