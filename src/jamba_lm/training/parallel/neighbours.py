"""What a document that is cut between processes needs of those on the left.

The convolution its last inputs, attention keys and values, the scan the state that the left side
ends in. Knows tensors and cuts, and no layer.

M rows, C channels, N state size, L = convolution taps - 1, K processes of the group, T rows of the
piece that continues, H query heads, G key/value heads, P width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.training.parallel.collectives import Group, shown_to_all
from jamba_lm.training.parallel.row_cut import RowCut


def inputs_before(
    u_MC: Tensor, look_back: int, sequences: int, cut: RowCut, context: Group
) -> tuple[Tensor, Tensor]:
    """Return `u_MC`, and the inputs before each piece: zeros but for the piece that continues.

    Every process shows the last L inputs that it has, so that a piece shorter than L is passed
    over to the one before it.
    """
    tail_LC = u_MC[-look_back:]
    if len(tail_LC) < look_back:
        tail_LC = F.pad(tail_LC, (0, 0, look_back - len(tail_LC), 0))
    u_MC, tails_KLC = shown_to_all(u_MC, tail_LC, context)
    wanted = min(cut.before, look_back)
    places = []
    for row in range(cut.first - wanted, cut.first):
        holder = next(k for k in cut.holders() if row < cut.bounds[k + 1])
        places.append(holder * look_back + look_back - (cut.bounds[holder + 1] - row))
    missing = u_MC.new_zeros(sequences * look_back - wanted, u_MC.shape[1])
    found = tails_KLC.flatten(0, 1)[places]
    before = torch.cat([missing[: look_back - wanted], found, missing[look_back - wanted :]])
    return u_MC, before.unflatten(0, (sequences, look_back))


def rows_before(
    q_MHP: Tensor, k_MGP: Tensor, v_MGP: Tensor, cut: RowCut, context: Group
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the queries, and keys and values of the continuing document's earlier rows."""
    d_head, rows = k_MGP.shape[2], k_MGP.shape[0]
    both = F.pad(torch.cat([k_MGP, v_MGP], -1), (0, 0, 0, 0, 0, cut.longest - rows))
    q_MHP, shown = shown_to_all(q_MHP, both, context)
    left = []
    for holder in cut.holders():
        first, end = cut.bounds[holder], cut.bounds[holder + 1]
        start = max(cut.first - cut.before - first, 0)
        held = shown[holder, start : end - first]
        left.append((held[..., :d_head], held[..., d_head:]))
    return q_MHP, left


def continued_scan(
    u_MC: Tensor,
    dt_MC: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    B_MN: Tensor,
    C_MN: Tensor,
    skip_C: Tensor,
    batch: Batch,
    cut: RowCut | None,
    context: Group,
) -> Tensor:
    """Run the selective scan over documents that are cut between processes.

    All processes scan at once, each from empty states. The recurrence is linear in its state, so
    what a state h from the left would have added is known afterwards:

        y_t += C_t exp(A (dt_1 + .. + dt_t)) h

    which is itself a scan, of no inputs, that begins at h. States are passed on the same way: where
    a document goes through a whole process, its end state is that process's own plus
    exp(A sum dt) times the one that came in. One exchange of [C, N + 1] values a process takes the
    place of a chain, forwards and backwards.

    Returns:
        What `ops.selective_scan` returns for the rows held here, without the states.
    """
    y_MC, states_BCN = ops.selective_scan(
        u_MC,
        dt_MC,
        dt_bias_C,
        A_CN,
        B_MN,
        C_MN,
        skip_C,
        batch.offsets,
        backend=batch.backend,
    )
    if cut is None:
        return y_MC
    if cut.before and len(batch.lengths) == 1:
        through_C = F.softplus(dt_MC.float() + dt_bias_C.float()).sum(0)
    else:
        through_C = dt_bias_C.new_zeros(dt_bias_C.shape, dtype=torch.float32)
    ends = torch.cat([states_BCN[-1], through_C[:, None].to(states_BCN.dtype)], -1)
    y_MC, shown = shown_to_all(y_MC, ends, context)
    if not cut.before:
        return y_MC
    holders = cut.holders()
    state_CN = shown[holders[0], :, :-1]
    for holder in holders[1:]:
        decay_CN = torch.exp(A_CN * shown[holder, :, -1:])
        state_CN = shown[holder, :, :-1] + decay_CN * state_CN
    length = batch.lengths[0]
    nothing = A_CN.new_zeros(1, len(A_CN))
    added, _ = ops.selective_scan(
        nothing.expand(length, -1),
        dt_MC[:length],
        dt_bias_C,
        A_CN,
        B_MN[:length].detach(),
        C_MN[:length],
        nothing[0],
        torch.tensor([0, length]),
        state_CN[None],
        backend=batch.backend,
    )
    corrected = (y_MC[:length].to(added.dtype) + added).to(y_MC.dtype)
    return torch.cat([corrected, y_MC[length:]])
