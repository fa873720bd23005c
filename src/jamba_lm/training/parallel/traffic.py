"""How much the processes of a layout say to each other in one pass, by arithmetic alone.

Imports no torch. Counts values, whatever their type: those of the largest side of every collective
call, which is the result of a gather, what a reduction reads, and what an exchange sends.
"""

from __future__ import annotations

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import LayerSpec, plan_layers
from jamba_lm.parallel_layout import ParallelLayout


def layer_values(
    config: JambaConfig, layer: LayerSpec, layout: ParallelLayout, *, rows: int, cut: bool = True
) -> dict[str, int]:
    """Return what one process says along each axis in one layer, forwards and backwards together.

    Args:
        config: of the model.
        layer: the kind of layer.
        layout: how many processes share what.
        rows: of this process: those of its batch, divided by `layout.context`.
        cut: whether some document lies on several context processes.

    Returns:
        Values by axis: "tensor", "context", "expert". An exchange between experts is that of
        even loads, with the share that stays at home counted too.
    """
    tensor = _mixer_values(config, layer, layout, rows) + _feed_forward_values(
        config, layer, layout, rows
    )
    context, expert = 0, 0
    if layout.context > 1 and cut:
        context = 2 * layout.context * _passed_on(config, layer, layout, rows)
    if layout.expert > 1 and layer.feed_forward == "moe":
        # There and back, and the same for the gradients.
        expert = 4 * rows * config.experts_per_token * config.d_model
    return {"tensor": tensor, "context": context, "expert": expert}


def pass_values(
    config: JambaConfig, layout: ParallelLayout, *, rows: int, cut: bool = True
) -> dict[str, int]:
    """Return what one process says along each axis in a forward and a backward pass."""
    total = {"tensor": 0, "context": 0, "expert": 0}
    for layer in plan_layers(config):
        for axis, values in layer_values(config, layer, layout, rows=rows, cut=cut).items():
            total[axis] += values
    if layout.tensor > 1:
        # Embeddings are added up, states are given to all parts of the vocabulary, and each row's
        # largest logit, sum and target are found together. Two crossings, as for two halves of a
        # layer, of which one has no way back without `sequence`.
        total["tensor"] += (4 if layout.sequence else 2) * rows * config.d_model + 3 * rows
        total["tensor"] += config.d_model if layout.sequence else 0
    return total


def _crossings(config: JambaConfig, layout: ParallelLayout, rows: int) -> int:
    """Count the values of entering and leaving a split part once, in both directions."""
    if layout.tensor == 1:
        return 0
    wide = rows * config.d_model
    # Two sums; or, of as many values, two gathers and two sums that leave a part to each, and the
    # gradient of the norm's gain.
    return 4 * wide + config.d_model if layout.sequence else 2 * wide


def _mixer_values(config: JambaConfig, layer: LayerSpec, layout: ParallelLayout, rows: int) -> int:
    values = _crossings(config, layout, rows)
    if layout.tensor == 1:
        return 0
    if layer.mixer == "mamba":
        values += 2 * rows * (config.dt_rank + 2 * config.state_size)
        values += config.d_model if config.proj_bias and layout.sequence else 0
    elif config.num_kv_heads % layout.tensor:
        values += 2 * config.num_kv_heads * config.d_head * config.d_model
    return values


def _feed_forward_values(
    config: JambaConfig, layer: LayerSpec, layout: ParallelLayout, rows: int
) -> int:
    values = _crossings(config, layout, rows)
    if layer.feed_forward == "moe" and layout.tensor > 1:
        values += rows * config.experts_per_token
    return values


def _passed_on(config: JambaConfig, layer: LayerSpec, layout: ParallelLayout, rows: int) -> int:
    """Count the values that one process shows the others of its context group, one way."""
    if layer.mixer == "attention":
        groups = max(1, config.num_kv_heads // layout.tensor)
        return rows * 2 * groups * config.d_head
    channels = config.d_inner // layout.tensor
    return channels * (config.conv_width - 1 + config.state_size + 1)
