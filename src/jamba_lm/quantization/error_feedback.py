"""One matrix in 4 bits, rounded so that its products with given rows change least.

Source: GPTQ (Frantar et al., arXiv 2210.17323), algorithm 1, with the inputs in the order of their
size as in its authors' code. The grids are those that rounding without rows would take, so the
result has the layout and the bytes of any other.

O outputs (rows of the matrix), I inputs, J groups of a row's inputs, T rows that the matrix meets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_lm.kernels.packed_weights import INT4_LIMIT, Int4Weight, pack
from jamba_lm.quantization.grid import find_grids, quantize_int4

# Share of the mean of the second moments that is added to each of them: rows that a text happens
# not to have count as well. On the embedded model 0.05 leaves less divergence on other text than
# 0.01 does.
DAMPING = 0.05
# Inputs whose errors are handed on to all others at once.
BLOCK = 128


def quantize_int4_for(weight_OI: Tensor, rows_TI: Tensor, group: int) -> Int4Weight:
    """Round a matrix to 4 bits with the least error of `rows_TI @ weight_OI.T` that is found.

    What rounding an input's weights does to the products is made up for by the weights of the
    inputs not yet rounded. Inputs that are zero in all rows are rounded to the nearest value.

    Args:
        weight_OI: any float dtype, finite; its inputs divide into groups.
        rows_TI: what the matrix meets, finite, of any float dtype. Without any, the matrix is
            rounded as `quantize_int4` does it.
        group: inputs that share a grid.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    if not len(rows_TI):
        return quantize_int4(weight_OI, group)
    scale_OJ, minimum_OJ = find_grids(weight_OI, group)
    order_I, share_II = _feedback(rows_TI)
    left_IO = weight_OI.float().t()[order_I].contiguous()
    # One row for each input, so that all that is met at once lies together.
    scale_IO = scale_OJ.float().t()[order_I // group]
    minimum_IO = minimum_OJ.float().t()[order_I // group]
    divisor_IO = torch.where(scale_IO > 0, scale_IO, 1.0)
    steps_IO = torch.empty_like(left_IO, dtype=torch.uint8)
    for first in range(0, len(left_IO), BLOCK):
        end = min(first + BLOCK, len(left_IO))
        errors_BO = torch.empty_like(left_IO[first:end])
        for i in range(first, end):
            steps_O = ((left_IO[i] - minimum_IO[i]) / divisor_IO[i]).round_().clamp_(0, INT4_LIMIT)
            steps_IO[i] = steps_O.to(torch.uint8)
            error_O = (left_IO[i] - steps_O * scale_IO[i] - minimum_IO[i]) / share_II[i, i]
            left_IO[i + 1 : end].addr_(share_II[i, i + 1 : end], error_O, alpha=-1.0)
            errors_BO[i - first] = error_O
        left_IO[end:].addmm_(share_II[first:end, end:].t(), errors_BO, alpha=-1.0)
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(len(order_I), device=order_I.device)
    return Int4Weight(pack(steps_IO[place_I].t().contiguous()), scale_OJ, minimum_OJ)


def _feedback(rows_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of the inputs, and how an error is shared out in that order.

    The second is the upper Cholesky factor of the inverse of the damped second moments: of an error
    of input i, divided by [i, i], a later input j makes up for [i, j].
    """
    rows_TI = rows_TI.float()
    # Their unit does not matter, and squares of very large or small values would leave float32.
    largest = rows_TI.abs().amax()
    if not torch.isfinite(largest):
        raise ValueError("rows_TI holds NaN or infinity: there is no nearest product")
    rows_TI = rows_TI / torch.where(largest > 0, largest, 1.0)
    moments_II = rows_TI.t() @ rows_TI / len(rows_TI)
    moments_I = moments_II.diagonal()
    order_I = moments_I.argsort(descending=True, stable=True)
    moments_II = moments_II[order_I][:, order_I]
    damping = DAMPING * moments_I.mean()
    # Without any input that is not zero, no error matters, and any positive number does. No
    # eigenvalue exceeds the sum of the moments, so that the largest is at most I / DAMPING of the
    # smallest: a few hundred thousand, which float32 can invert.
    moments_II.diagonal().add_(torch.where(damping > 0, damping, 1.0))
    lower_II = torch.linalg.cholesky(moments_II)
    return order_I, torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)
