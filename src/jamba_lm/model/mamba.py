"""The Mamba-1 mixer: convolution, selection, scan, gate, with Jamba's three inner norms.

Does not know how the scan is computed, nor who keeps its state.

M rows, C channels, N state size, L = convolution taps - 1, R rank of dt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.norm import NoNorm, RMSNorm
from jamba_lm.model.state import MambaState


class MambaMixer(nn.Module):
    """A selective state-space layer over C = expand * d_model channels.

    Jamba normalises dt, B and C before the scan: at 7B without it, large inner activations made
    the loss spike. `inner_norms = False` leaves the norms out, for that study.

    `log_decay_CN` (the checkpoint's A_log) and `skip_C` (D) stay in float32 whatever the model's
    dtype, also after `.to(torch.bfloat16)`: the decay is exponentiated twice.

    Paper: Mamba Algorithm 2 and Figure 3; Jamba §6.4. Source: transformers `JambaMambaMixer`
    (the first half of in_proj is convolved, the second is the gate).
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        channels, state_size, rank = config.d_inner, config.state_size, config.dt_rank
        self.split_sizes = (rank, state_size, state_size)
        self.in_proj = nn.Linear(config.d_model, 2 * channels, bias=config.proj_bias)
        self.conv_CW = nn.Parameter(torch.empty(channels, config.conv_width))
        self.conv_bias_C = nn.Parameter(torch.empty(channels)) if config.conv_bias else None
        self.x_proj = nn.Linear(channels, sum(self.split_sizes), bias=False)
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(size, config.norm_eps) if config.inner_norms else NoNorm()
            for size in self.split_sizes
        )
        self.dt_proj = nn.Linear(rank, channels, bias=False)
        self.dt_bias_C = nn.Parameter(torch.empty(channels))
        self.log_decay_CN = nn.Parameter(torch.empty(channels, state_size, dtype=torch.float32))
        self.skip_C = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.out_proj = nn.Linear(channels, config.d_model, bias=config.proj_bias)

    def forward(self, x_MD: Tensor, batch: Batch, state: Sequence[MambaState] | None) -> Tensor:
        """Mix the rows of each sequence, continuing from `state` and leaving it after them."""
        u_MC, gate_MC = self.in_proj(x_MD).chunk(2, dim=-1)

        conv_BLC, scan_BCN = None, None
        if state is not None:
            conv_BLC = _together([one.conv_LC for one in state])
            scan_BCN = _together([one.scan_CN for one in state])
        u_MC, conv_BLC = ops.causal_conv(
            u_MC,
            self.conv_CW,
            self.conv_bias_C,
            batch.offsets,
            conv_BLC,
            silu=True,
            backend=batch.backend,
        )
        dt_MR, B_MN, C_MN = self.x_proj(u_MC).split(self.split_sizes, dim=-1)
        y_MC, scan_BCN = ops.selective_scan(
            u_MC,
            self.dt_proj(self.dt_norm(dt_MR, batch)),
            self.dt_bias_C,
            -self.log_decay_CN.exp(),
            self.B_norm(B_MN, batch),
            self.C_norm(C_MN, batch),
            self.skip_C,
            batch.offsets,
            scan_BCN,
            backend=batch.backend,
        )
        if state is not None:
            for one, conv_LC, scan_CN in zip(state, conv_BLC, scan_BCN, strict=True):
                one.conv_LC, one.scan_CN = conv_LC, scan_CN
        return self.out_proj(ops.silu_gate(y_MC, gate_MC, backend=batch.backend))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MambaMixer:
        # Every `.to()`, `.bfloat16()` and `.cuda()` of a module comes through here.
        wide = (self.log_decay_CN, self.skip_C)
        kept = {id(x) for x in wide} | {id(x.grad) for x in wide if x.grad is not None}

        def without_narrowing(x: Tensor) -> Tensor:
            moved = fn(x)
            if id(x) in kept and moved.dtype.itemsize < x.dtype.itemsize:
                return x.to(moved.device)
            return moved

        return super()._apply(without_narrowing, recurse)  # type: ignore[no-untyped-call]


def _together(parts: Sequence[Tensor]) -> Tensor:
    # One sequence is the common case and needs no copy.
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))
