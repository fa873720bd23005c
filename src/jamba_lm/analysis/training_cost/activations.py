"""What a rank keeps between forward and backward, to the byte, by layer and part.

Needs no torch. The numbers are those of `model/` and `kernels/` on a CPU, counted tensor by tensor
and held against torch's own by a test; on other devices they are what the same operations need.

M rows, D model width, C Mamba channels, N state size, R rank of dt, F inner width, H query heads,
G key/value heads, P head width, X experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jamba_lm.analysis.training_cost.rank import Rank, layer_kinds, padded_rows
from jamba_lm.model.layout import LayerSpec, plan_layers

FLOAT, INDEX = 4, 8

# As kernels/native_scan.py and training/loss.py, which need torch, have them: a test compares.
SCAN_CHECKPOINT_TOKENS, SCAN_CHANNELS, SCAN_STATES = 16, 16, 8
LOGIT_ROWS = 1024
WEIGHT_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes that one pass keeps on a rank, until their layer's gradient is computed.

    Attributes:
        layers: of all layers: everything, or their inputs where layers are computed again.
        by_part: of `layers`: "norms", "Mamba", "scan states", "attention", "MLP", "routing",
            "experts", or "layer inputs".
        again: of the one layer that is computed again at a time; 0 where none is.
        ends: embedding, final norm, and what the loss keeps.
        logits: pieces of logits and their gradients while the loss is computed.
    """

    layers: int
    by_part: dict[str, int]
    again: int
    ends: int
    logits: int

    @property
    def total(self) -> int:
        """The most at a time. Logits exist before any layer is computed again, or after none is."""
        return self.layers + self.ends + max(self.again, self.logits)


def pass_activations(rank: Rank, loads: Sequence[Sequence[int]] | None = None) -> Activations:
    """Count what a pass keeps.

    Args:
        rank: whose.
        loads: rows that each expert of each mixture gets, in the order of layers; equally many
            when None.
    """
    parts: dict[str, int] = {}
    largest = layers = 0
    for kept, count in _layers(rank, loads):
        largest = max(largest, sum(kept.values()))
        if rank.work.recompute:
            kept = {"layer inputs": rank.kept_rows * rank.config.d_model * rank.work.width}
        layers += count * sum(kept.values())
        for part, num_bytes in kept.items():
            parts[part] = parts.get(part, 0) + count * num_bytes
    return Activations(
        layers=layers,
        by_part=parts,
        again=largest if rank.work.recompute else 0,
        ends=_ends(rank),
        logits=_logits(rank),
    )


def _layers(
    rank: Rank, loads: Sequence[Sequence[int]] | None
) -> Iterator[tuple[dict[str, int], int]]:
    """Yield what layers keep, and how many keep as much."""
    if loads is None:
        for spec, count in layer_kinds(rank.config):
            yield layer_activations(rank, spec), count
        return
    remaining = iter(loads)
    for spec in plan_layers(rank.config):
        mixture = next(remaining) if spec.feed_forward == "moe" else None
        yield layer_activations(rank, spec, mixture), 1


def layer_activations(
    rank: Rank, spec: LayerSpec, loads: Sequence[int] | None = None
) -> dict[str, int]:
    """Count what one layer keeps for its backward pass, by part, in bytes."""
    config, w = rank.config, rank.work.width
    # What is normalised, and a factor of each row; the result is kept by what it goes into.
    norms = 2 * rank.kept_rows * (config.d_model * w + FLOAT)
    mixer = _mamba(rank) if spec.mixer == "mamba" else _attention(rank)
    if spec.feed_forward == "moe":
        feed_forward = _mixture(rank, loads)
    else:
        feed_forward = {"MLP": rank.rows * (config.d_model + 3 * rank.inner) * w}
    return {"norms": norms, **mixer, **feed_forward}


def _mamba(rank: Rank) -> dict[str, int]:
    config, M, C, w = rank.config, rank.rows, rank.channels, rank.work.width
    D, N, R = config.d_model, config.state_size, config.dt_rank
    # Input, both halves of in_proj, the convolution's result, dt, y and the gated y; x_proj's rows.
    kept = M * (D + 2 * C + C + C + C + C + R + 2 * N) * w
    if config.inner_norms:
        kept += M * ((R + 2 * N) * w + 3 * FLOAT)
    # exp(A_log) for its own gradient, and A for the scan's.
    kept += 2 * C * N * FLOAT
    return {"Mamba": kept, "scan states": scan_state_bytes(rank)}


def scan_state_bytes(rank: Rank) -> int:
    """Return the bytes of the states that one scan keeps: one for 16 tokens, in whole vectors."""
    points = rank.work.sequences * -(-rank.tokens // SCAN_CHECKPOINT_TOKENS)
    channels = -(-rank.channels // SCAN_CHANNELS) * SCAN_CHANNELS
    states = -(-rank.config.state_size // SCAN_STATES) * SCAN_STATES
    return points * channels * states * FLOAT


def _attention(rank: Rank) -> dict[str, int]:
    config, M, w = rank.config, rank.rows, rank.work.width
    D, H, G, P = config.d_model, rank.heads, rank.groups, config.d_head
    keys = rank.work.sequences * rank.work.tokens
    # Input, queries and result, keys and values, and the sum of each row's weights.
    kept = M * (D + 2 * H * P) * w + 2 * keys * G * P * w + M * H * FLOAT
    if rank.work.sequences > 1:
        # The results of sequences, each on its own, and all of them side by side for o_proj.
        kept += M * H * P * w
    return {"attention": kept}


def _mixture(rank: Rank, loads: Sequence[int] | None) -> dict[str, int]:
    config, M, w = rank.config, rank.rows, rank.work.width
    D, X, K = config.d_model, config.num_experts, config.experts_per_token
    if loads is None:
        rows = round(rank.experts * padded_rows(rank.expert_rows, w))
    else:
        rows = sum(_filled(load, w) for load in loads if load)
    # Probabilities, the experts taken, and where their rows go; what they give, to be weighed.
    routing = M * (D * w + X * FLOAT + 2 * K * INDEX + K * D * w + K * w)
    # The numbers of the rows of all experts, in one list.
    routing += rows * INDEX
    return {"routing": routing, "experts": rows * (D + 3 * rank.inner) * w}


def _filled(load: int, width: int) -> int:
    if width != 2:
        return load
    return 1 << (load - 1).bit_length() if load <= 128 else -(-load // 128) * 128


def _ends(rank: Rank) -> int:
    config, w = rank.config, rank.work.width
    D, V = config.d_model, rank.vocabulary
    ids = rank.rows * INDEX
    final_norm = rank.kept_rows * (D * w + FLOAT)
    # The hidden states; their gradients and the head's, which are made with the loss: this one in
    # float32 where it is a sum.
    loss = 2 * rank.rows * D * w + V * D * (w if rank.rows <= LOGIT_ROWS else FLOAT)
    return ids + final_norm + loss


def _logits(rank: Rank) -> int:
    rows = min(rank.rows, LOGIT_ROWS)
    # A piece as the product gives it, in float32, and its gradient in the model's type; and a
    # product of some rows of the head on its way into the sum.
    wide = rows * rank.vocabulary * (FLOAT + 2 * rank.work.width)
    return wide + min(rank.vocabulary, WEIGHT_ROWS) * rank.config.d_model * rank.work.width
