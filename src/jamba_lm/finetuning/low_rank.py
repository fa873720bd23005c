"""Adapters as modules around a decoder's own: put in, drawn, and taken out again.

A rewrite of a finished decoder, which does not know of it. Knows no data and no optimizer.

O outputs, I inputs, R rank, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.checkpoint.adapter import Adapter, LowRank
from jamba_lm.finetuning.linears import LinearPlace
from jamba_lm.kernels import ops
from jamba_lm.model.decoder import Decoder
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.training.loss import Product


class LowRankModule(nn.Module):
    """A module whose matrix W is W + scale * lora_B lora_A.

    Attributes:
        base: what is adapted; not trained.
        lora_A: I to R.
        lora_B: R to O; zero at the start, so that training starts from the model as it is.
        scale: of the product of the two.
        dropout: share of the inputs that lora_A does not see in a training pass.
        draw: names the pass, and the module in it: what is dropped follows from it alone, so that
            a layer that is computed again, or a run that is resumed, drops the same.

    Source: Hu et al., LoRA (arXiv 2106.09685), §4.1; Kalajdzievski (arXiv 2312.03732) for rslora.
    """

    def __init__(
        self, base: nn.Module, inputs: int, outputs: int, *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.utils.skip_init(nn.Linear, inputs, rank, bias=False)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, outputs, bias=False)
        self.scale = scale
        self.dropout = dropout
        self.draw = 0

    def draw_values(self, draw: torch.Generator) -> None:
        """Take first values, float32, as peft draws them: lora_A within 1 / sqrt(inputs)."""
        rank, inputs = self.lora_A.weight.shape
        bound = 1.0 / math.sqrt(inputs)
        down_RI = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draw)
        self.lora_A.weight = nn.Parameter(down_RI)
        self.lora_B.weight = nn.Parameter(torch.zeros(self.lora_B.weight.shape))


class LowRankLinear(LowRankModule):
    """y = base(x) + scale * lora_B(lora_A(dropout(x)))."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (..., O) in the dtype of `x`, which is (..., I)."""
        return torch.add(self.base(x), self.lora_B(self._down(x)), alpha=self.scale)

    def _down(self, x: Tensor) -> Tensor:
        if self.dropout and torch.is_grad_enabled():
            x = x * self._kept(x)
        down: Tensor = self.lora_A(x)
        return down

    def _kept(self, x: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(self.draw)
        kept = torch.rand(x.shape, generator=draw) >= self.dropout
        return kept.to(x.dtype).div_(1.0 - self.dropout).to(x.device)


class LowRankHead(LowRankLinear):
    """A head with a change. See `training.output.SummedHead`: losses make logits in pieces."""

    def products(self, hidden_MD: Tensor) -> list[Product]:
        """Return the two products whose sum is `forward`."""
        own_VD: Tensor = self.base.get_parameter("weight")
        down_MR = self.scale * self._down(hidden_MD)
        return [Product(hidden_MD, own_VD), Product(down_MR, self.lora_B.weight)]


class LowRankEmbedding(LowRankModule):
    """An embedding whose matrix [V, D] has a change: O is V and I is D.

    Nothing is dropped: there is no input but the token, as in peft.
    """

    def forward(self, ids_M: Tensor) -> Tensor:
        """Return the embeddings (M, D)."""
        change_MR = F.embedding(ids_M, self.lora_B.weight)
        return torch.add(self.base(ids_M), change_MR @ self.lora_A.weight, alpha=self.scale)

    def draw_values(self, draw: torch.Generator) -> None:
        """Take first values, float32, as peft draws them: lora_A is normal."""
        super().draw_values(draw)
        self.lora_A.weight.data.normal_(generator=draw)


KINDS: dict[str, type[LowRankModule]] = {"embedding": LowRankEmbedding, "head": LowRankHead}


class ThroughPacked(nn.Module):
    """A packed matrix that lets a gradient through to its input, and gets none itself.

    A packed module by itself keeps the unpacked matrix from the forward to the backward pass: all
    of them together are the model unpacked. Here it is unpacked a second time instead.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor (..., O) in the dtype of `x`, which is (..., I)."""
        through: Tensor = _Through.apply(x, self.packed)  # type: ignore[no-untyped-call]
        return through


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedLinear) -> Tensor:
        ctx.weight = packed.weight
        rows = x.detach().reshape(-1, x.shape[-1])
        y = ops.packed_linear(rows, packed.weight, packed.bias, backend=packed.backend)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        # Made for this product, and let go again.
        weight_OI = ctx.weight.dequantize(slopes[0].dtype)
        return slopes[0] @ weight_OI, None


def let_gradients_through(decoder: Decoder) -> None:
    """Wrap every packed matrix inside the layers of `decoder`."""
    for path, module in list(decoder.named_modules()):
        if path.startswith("blocks.") and isinstance(module, PackedLinear):
            _replace(decoder, path, ThroughPacked(module))


def insert(
    decoder: Decoder, places: Sequence[LinearPlace], *, rank: int, scale: float, dropout: float
) -> None:
    """Freeze `decoder` and put an adapter without values around each of `places`."""
    decoder.requires_grad_(False)
    for place in places:
        base = decoder.get_submodule(place.path)
        adapted = KINDS.get(place.kind, LowRankLinear)(
            base, place.inputs, place.outputs, rank=rank, scale=scale, dropout=dropout
        )
        _replace(decoder, place.path, adapted)


def draw_values(decoder: Decoder, seed: int) -> None:
    """Give every adapter its first values, float32, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    for _, module in adapters(decoder):
        module.draw_values(draw)


def adapters(decoder: Decoder) -> list[tuple[str, LowRankModule]]:
    """List the adapters of a decoder with the paths of the modules that they are around."""
    return [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, LowRankModule)
    ]


def name_pass(decoder: Decoder, number: int, seed: int) -> None:
    """Tell every adapter which pass follows, for what it drops."""
    for index, (_, module) in enumerate(adapters(decoder)):
        # Three small numbers in one; generators take 64 bits.
        module.draw = (seed * 1_000_003 + number) * 100_003 + index & (2**63 - 1)


def as_adapter(decoder: Decoder, masters: Mapping[str, Tensor], base: str | None) -> Adapter:
    """Return what the adapters of `decoder` change.

    Args:
        decoder: has adapters.
        masters: the float32 values of what is trained, by name.
        base: what the decoder's own weights were read from.
    """
    changes = {
        f"{path}.weight": LowRank(
            masters[f"{path}.lora_A.weight"], masters[f"{path}.lora_B.weight"], module.scale
        )
        for path, module in adapters(decoder)
    }
    return Adapter(changes, base=base)


def _replace(decoder: Decoder, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, module)
