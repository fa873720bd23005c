"""The sizes that one rank of a mesh computes with in one forward and backward pass.

Needs no torch. D model width, C Mamba channels, F feed-forward width, H query heads, G key/value
heads, P head width, X experts, K experts per token, V vocabulary; rows are tokens of the rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from jamba_lm.analysis.training_cost.mesh import row_share
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import LayerSpec, plan_layers
from jamba_lm.parallel_layout import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What goes through the model at one time, on each rank that reads.

    Attributes:
        sequences: of equal length, laid end to end.
        tokens: of each sequence.
        width: bytes of a value that is computed with: 2 for bfloat16, 4 for float32.
        recompute: layers keep only their input and run again in the backward pass.
    """

    sequences: int
    tokens: int
    width: int = 2
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Rank:
    """A shape, cut down to the share of one rank.

    Attributes:
        config: the whole shape.
        mesh: how it is cut.
        work: what goes through it.
    """

    config: JambaConfig
    mesh: ParallelLayout
    work: Pass

    @property
    def tokens(self) -> int:
        """Tokens of each sequence that this rank reads."""
        return self.work.tokens // self.mesh.context

    @property
    def rows(self) -> int:
        """Tokens of all sequences that this rank reads."""
        return self.work.sequences * self.tokens

    @property
    def kept_rows(self) -> int:
        """Rows of the residual stream that this rank keeps."""
        return self.rows // row_share(self.mesh)

    @property
    def expert_rows(self) -> float:
        """Rows that each expert of this rank gets, when all experts get equally many."""
        sent = self.rows * self.config.experts_per_token
        return self.mesh.expert * sent / self.config.num_experts

    @property
    def experts(self) -> int:
        """Experts that this rank computes, of each layer that has any."""
        return self.config.num_experts // self.mesh.expert

    @property
    def channels(self) -> int:
        """Mamba channels."""
        return self.config.d_inner // self.mesh.tensor

    @property
    def inner(self) -> int:
        """Inner width of an MLP, or of an expert."""
        return self.config.d_ff // self.mesh.tensor

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.num_heads // self.mesh.tensor

    @property
    def groups(self) -> int:
        """Key/value heads, or the one that several ranks look at."""
        return max(1, self.config.num_kv_heads // self.mesh.tensor)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding and of the head."""
        return self.config.vocab_size // self.mesh.tensor


@functools.lru_cache(maxsize=16)
def layer_kinds(config: JambaConfig) -> tuple[tuple[LayerSpec, int], ...]:
    """Return one layer of each kind, in the order they first come, and how many there are."""
    first: dict[tuple[str, str], LayerSpec] = {}
    count: dict[tuple[str, str], int] = {}
    for spec in plan_layers(config):
        kind = spec.mixer, spec.feed_forward
        first.setdefault(kind, spec)
        count[kind] = count.get(kind, 0) + 1
    return tuple((first[kind], count[kind]) for kind in first)


def padded_rows(rows: float, width: int) -> float:
    """Return the rows that an expert computes: in bfloat16 a few more, so that few sizes occur.

    `model/moe.py` rounds up, and the number that is rounded is random: the mean of the numbers one
    deviation below, at and above it stands for it.

    >>> padded_rows(100.0, 4), padded_rows(96.0, 2)
    (100.0, 128.0)
    """
    if width != 2:
        return rows
    deviation = rows**0.5
    given = (max(1.0, rows - deviation), max(1.0, rows), rows + deviation)
    return sum(_round_up(round(one)) for one in given) / len(given)


def _round_up(rows: int) -> int:
    # As model/moe.py does, which needs torch.
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 128) * 128
