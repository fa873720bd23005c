"""A loss on the size of what each mixer and each feed-forward adds to the residual stream.

Knows a decoder's layers, and nothing of optimizers and data.

At the scale of Jamba-1.5 the outputs of some experts and of the last Mamba layers grew to 4e6,
which float16 cannot hold. A small multiple of their mean square, added to the loss, keeps them
small and costs no quality.

Paper: Jamba-1.5 §3.2 (alpha = 1e-5 for Large, harmless up to 1e-3).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jamba_lm.model.decoder import Decoder


class ActivationLoss:
    """The mean square of all layers' outputs of one decoder, and its gradient.

    The gradient is added where the outputs come by on the way back, so that nothing is kept for
    it, also when layers are computed again in the backward pass.
    """

    def __init__(self, decoder: Decoder, coefficient: float) -> None:
        """Watch `decoder` from now on.

        Args:
            decoder: every forward pass of it that needs gradients is penalised.
            coefficient: alpha.
        """
        self._coefficient = coefficient
        self._weight = 0.0
        self._found: dict[tuple[int, str], Tensor] = {}
        self._outputs = 2 * len(decoder.blocks)
        for number, block in enumerate(decoder.blocks):
            for part in ("mixer", "feed_forward"):
                hook = partial(self._penalise, (number, part))
                block.get_submodule(part).register_forward_hook(hook)

    def begin(self, share: float) -> None:
        """Start a pass whose mean square counts as `share` of the step's."""
        self._found.clear()
        self._weight = self._coefficient * share / self._outputs

    def mean_square(self) -> float:
        """Return the mean over all outputs of the pass, without its coefficient."""
        return torch.stack(list(self._found.values())).mean().item()

    def _penalise(
        self, key: tuple[int, str], _module: nn.Module, _inputs: Any, output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # By key and not appended: a layer that is computed again comes by a second time.
        norm = torch.linalg.vector_norm(output.detach(), dtype=torch.float32)
        self._found[key] = norm.square() / output.numel()
        penalised: Tensor = _MeanSquare.apply(output, self._weight)  # type: ignore[no-untyped-call]
        return penalised


class _MeanSquare(torch.autograd.Function):
    """The identity, with the gradient of `weight` times the mean square added on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (slope,) = slopes
        return torch.add(slope, x, alpha=2.0 * ctx.weight / x.numel()), None
