"""The name and shape of every parameter of a decoder, without making one. Needs no torch.

A test holds the list against the decoder itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import LayerSpec, plan_layers

Shape = tuple[int, ...]

# Parameters, by the last word of their name, that stay in float32 whatever the model's dtype.
KEPT_WIDE = ("log_decay_CN", "skip_C")


def parameter_shapes(config: JambaConfig) -> dict[str, Shape]:
    """Return the shape of each parameter of `Decoder(config)`, by its name there.

    >>> shapes = parameter_shapes(JambaConfig(num_layers=1, tie_embeddings=True))
    >>> shapes["blocks.0.mixer.conv_CW"], "head.weight" in shapes
    ((8192, 4), False)
    """
    table: Shape = (config.vocab_size, config.d_model)
    shapes: dict[str, Shape] = {"embedding.weight": table}
    for layer in plan_layers(config):
        for name, shape in _layer(config, layer):
            shapes[f"blocks.{layer.index}.{name}"] = shape
    shapes["final_norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        shapes["head.weight"] = table
    return shapes


def _layer(config: JambaConfig, layer: LayerSpec) -> Iterator[tuple[str, Shape]]:
    width = config.d_model
    yield "mixer_norm.weight", (width,)
    yield from (
        (f"mixer.{name}", shape)
        for name, shape in (
            attention_shapes(config) if layer.mixer == "attention" else mamba_shapes(config)
        ).items()
    )
    yield "feed_forward_norm.weight", (width,)
    mlp = mlp_shapes(config)
    if layer.feed_forward == "mlp":
        yield from ((f"feed_forward.{name}", shape) for name, shape in mlp.items())
        return
    yield "feed_forward.router.weight", (config.num_experts, width)
    for expert in range(config.num_experts):
        yield from ((f"feed_forward.experts.{expert}.{n}", shape) for n, shape in mlp.items())


def attention_shapes(config: JambaConfig) -> dict[str, Shape]:
    """Return the parameters of an attention mixer, by their names in it."""
    width = config.d_model
    query_width = config.num_heads * config.d_head
    key_width = config.num_kv_heads * config.d_head
    return {
        "q_proj.weight": (query_width, width),
        "k_proj.weight": (key_width, width),
        "v_proj.weight": (key_width, width),
        "o_proj.weight": (width, query_width),
    }


def mamba_shapes(config: JambaConfig) -> dict[str, Shape]:
    """Return the parameters of a Mamba mixer, by their names in it."""
    width, channels = config.d_model, config.d_inner
    rank, state_size = config.dt_rank, config.state_size
    shapes: dict[str, Shape] = {
        "in_proj.weight": (2 * channels, width),
        "conv_CW": (channels, config.conv_width),
        "x_proj.weight": (rank + 2 * state_size, channels),
        "dt_proj.weight": (channels, rank),
        "dt_bias_C": (channels,),
        "log_decay_CN": (channels, state_size),
        "skip_C": (channels,),
        "out_proj.weight": (width, channels),
    }
    if config.conv_bias:
        shapes["conv_bias_C"] = (channels,)
    if config.proj_bias:
        shapes |= {"in_proj.bias": (2 * channels,), "out_proj.bias": (width,)}
    if config.inner_norms:
        norms = {"dt": rank, "B": state_size, "C": state_size}
        shapes |= {f"{name}_norm.weight": (size,) for name, size in norms.items()}
    return shapes


def mlp_shapes(config: JambaConfig) -> dict[str, Shape]:
    """Return the parameters of an MLP, or of one expert, by their names in it."""
    return {
        "gate_proj.weight": (config.d_ff, config.d_model),
        "up_proj.weight": (config.d_ff, config.d_model),
        "down_proj.weight": (config.d_model, config.d_ff),
    }
