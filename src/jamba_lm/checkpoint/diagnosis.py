"""Why a checkpoint's tensors do not fit its config.json, told in the fields a user can edit.

Knows names and shapes only: no tensors, no files, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from jamba_lm.checkpoint.rename import LAYER, Shape
from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers

MAX_LISTED = 3
MAX_CLUES = 6
MAX_NAME = 80
MAX_AXES = 6


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The differences between what a config needs and what a checkpoint holds.

    Attributes:
        missing: public names needed and not stored.
        left_over: stored names that nothing needs.
        wrong_shape: public name -> (stored shape, needed shape).
        clashing: public names that two stored tensors claim.
    """

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    clashing: dict[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether there is any difference."""
        return bool(self.missing or self.left_over or self.wrong_shape or self.clashing)

    def describe(self) -> str:
        """Say on one line what differs, a few names of each kind."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing: {listed(self.missing)}")
        if self.left_over:
            parts.append(f"{len(self.left_over)} left over: {listed(self.left_over)}")
        if self.wrong_shape:
            shapes = [
                f"{shown(name)} is {shown_shape(stored)}, needed {shown_shape(needed)}"
                for name, (stored, needed) in self.wrong_shape.items()
            ]
            parts.append(f"{len(shapes)} of the wrong shape: {_bounded(shapes)}")
        if self.clashing:
            pairs = [f"{shown(one)} by {listed(by)}" for one, by in self.clashing.items()]
            parts.append(f"{len(pairs)} given more than once: {_bounded(pairs)}")
        return "; ".join(parts)


def shown(name: str) -> str:
    """Make a name out of a file fit for a one-line message."""
    clean = name.encode("unicode_escape").decode("ascii")
    return clean if len(clean) <= MAX_NAME else clean[: MAX_NAME - 3] + "..."


def shown_shape(shape: Shape) -> str:
    """Write a shape for a message; a damaged file may claim thousands of axes.

    >>> shown_shape((4, 1)), shown_shape((1,) * 3000)
    ('[4, 1]', 'of 3000 axes')
    """
    return str(list(shape)) if len(shape) <= MAX_AXES else f"of {len(shape)} axes"


def listed(names: Iterable[str]) -> str:
    """Join the first few names, and count the rest.

    >>> listed(f"w{i}" for i in range(6))
    'w0, w1, w2 and 3 more'
    """
    return _bounded([shown(name) for name in names])


def _bounded(items: list[str]) -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def find_clues(config: JambaConfig, shapes: Mapping[str, Shape]) -> list[str]:
    """Name the fields of config.json that the stored tensors contradict, likeliest first.

    Args:
        config: what config.json says.
        shapes: the stored tensors, under public names.

    Returns:
        At most `MAX_CLUES` phrases; none when the tensors do not tell.
    """
    if "embed_tokens.weight" in shapes and "model.embed_tokens.weight" not in shapes:
        return ["the names lack 'model.': was the bare JambaModel saved, without its head?"]
    layers = _by_layer(shapes)
    clues = [
        *_depth_clues(config, layers),
        *_mixer_clues(config, layers),
        *_expert_clues(config, layers),
        *_size_clues(config, shapes, layers),
        *_presence_clues(config, shapes, layers),
    ]
    return clues[:MAX_CLUES]


def _by_layer(shapes: Mapping[str, Shape]) -> dict[int, dict[str, Shape]]:
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    return layers


def _depth_clues(config: JambaConfig, layers: Mapping[int, object]) -> list[str]:
    depth = max(layers, default=-1) + 1
    return _compare("num_hidden_layers", config.num_layers, depth)


def _compare(key: str, configured: object, stored: object) -> list[str]:
    if configured == stored:
        return []
    return [f"{key} is {configured} in config.json, the tensors say {stored}"]


def _mixer_clues(config: JambaConfig, layers: Mapping[int, Mapping[str, Shape]]) -> list[str]:
    plan = plan_layers(config)
    attention = {i for i, names in layers.items() if _holds(names, "self_attn.")}
    mamba = {i for i, names in layers.items() if _holds(names, "mamba.")}
    rule = (
        f"attn_layer_period {config.attention_period}, attn_layer_offset {config.attention_offset}"
    )
    for layer in plan[: max(layers, default=-1) + 1]:
        if layer.mixer == "mamba" and layer.index in attention - mamba:
            kinds = ("a Mamba layer", "self_attn.*")
        elif layer.mixer == "attention" and layer.index in mamba - attention:
            kinds = ("an attention layer", "mamba.*")
        else:
            continue
        fit = _fitting_rule("attn", config.attention_period, attention, max(layers) + 1)
        return [
            f"layer {layer.index} is {kinds[0]} in config.json ({rule}) "
            f"but holds {kinds[1]} tensors; {fit}"
        ]
    return []


def _expert_clues(config: JambaConfig, layers: Mapping[int, Mapping[str, Shape]]) -> list[str]:
    sparse = {i for i, names in layers.items() if _holds(names, "feed_forward.router.")}
    experts = _most_common(
        names["feed_forward.router.weight"][0]
        for i, names in layers.items()
        if i in sparse and names.get("feed_forward.router.weight")
    )
    if not sparse:
        planned = any(layer.feed_forward == "moe" for layer in plan_layers(config))
        return _compare("num_experts", config.num_experts, 1) if planned and layers else []
    clues = [] if experts is None else _compare("num_experts", config.num_experts, experts)
    if config.num_experts == 1:
        return clues
    rule = f"expert_layer_period {config.expert_period}, expert_layer_offset {config.expert_offset}"
    for layer in plan_layers(config)[: max(layers) + 1]:
        if layer.index in layers and (layer.feed_forward == "moe") != (layer.index in sparse):
            says, holds = ("no ", "") if layer.feed_forward == "mlp" else ("", "no ")
            fit = _fitting_rule("expert", config.expert_period, sparse, max(layers) + 1)
            clues.append(
                f"layer {layer.index} has {says}experts in config.json ({rule}) "
                f"but the tensors have {holds}router there; {fit}"
            )
            break
    return clues


def _fitting_rule(kind: str, period: int, wanted: set[int], depth: int) -> str:
    """Say which period (the configured one, if it can be) and offset pick exactly `wanted`.

    >>> _fitting_rule("attn", 8, {4}, depth=8)
    'attn_layer_period 8 with attn_layer_offset 4 would fit'
    """
    places = sorted(wanted)
    gaps = {later - earlier for earlier, later in pairwise(places)}
    if not places:
        period, offset = depth + 1, depth
    elif not gaps:
        offset = places[0]
        period = max(period, offset + 1, depth - offset)
    else:
        offset, period = places[0], min(gaps)
    if places != list(range(offset, depth, period)) or offset >= period:
        return f"no {kind}_layer_period and {kind}_layer_offset fit what is stored"
    return f"{kind}_layer_period {period} with {kind}_layer_offset {offset} would fit"


def _size_clues(
    config: JambaConfig,
    shapes: Mapping[str, Shape],
    layers: Mapping[int, Mapping[str, Shape]],
) -> list[str]:
    def stored(pattern: str, axis: int) -> int | None:
        return _most_common(
            shape[axis]
            for names in layers.values()
            for name, shape in names.items()
            if name.endswith(pattern) and len(shape) > axis
        )

    embedding = shapes.get("model.embed_tokens.weight", ())
    vocab, width = embedding if len(embedding) == 2 else (None, None)
    channels = stored("mamba.out_proj.weight", 1)
    queries, keys = stored("self_attn.q_proj.weight", 0), stored("self_attn.k_proj.weight", 0)
    heads = "num_attention_heads x head_dim"
    sizes: list[tuple[str, int, int | None]] = [
        ("vocab_size", config.vocab_size, vocab),
        ("hidden_size", config.d_model, width),
        ("intermediate_size", config.d_ff, stored("down_proj.weight", 1)),
        (heads, config.num_heads * config.d_head, queries),
        (heads.replace("attention", "key_value"), config.num_kv_heads * config.d_head, keys),
        ("mamba_d_state", config.state_size, stored("mamba.A_log", 1)),
        ("mamba_d_conv", config.conv_width, stored("mamba.conv1d.weight", 2)),
        ("mamba_dt_rank", config.dt_rank, stored("mamba.dt_proj.weight", 1)),
    ]
    if channels is not None and width and channels % width == 0:
        sizes.append(("mamba_expand", config.expand, channels // width))
    return [
        clue
        for key, configured, found in sizes
        if found is not None
        for clue in _compare(key, configured, found)
    ]


def _presence_clues(
    config: JambaConfig,
    shapes: Mapping[str, Shape],
    layers: Mapping[int, Mapping[str, Shape]],
) -> list[str]:
    clues = []
    if "model.embed_tokens.weight" in shapes:
        tied = "lm_head.weight" not in shapes
        clues += _compare("tie_word_embeddings", *map(_json, (config.tie_embeddings, tied)))
    mamba = [names for names in layers.values() if _holds(names, "mamba.in_proj.")]
    flags: list[tuple[str, bool, str]] = [
        ("mamba_conv_bias", config.conv_bias, "mamba.conv1d.bias"),
        ("mamba_proj_bias", config.proj_bias, "mamba.in_proj.bias"),
        ("mamba_inner_layernorms", config.inner_norms, "mamba.dt_layernorm.weight"),
    ]
    for key, configured, name in flags:
        present = _most_common(name in names for names in mamba)
        if present is not None:
            clues += _compare(key, *map(_json, (configured, bool(present))))
    return clues


_json: Callable[[bool], str] = {True: "true", False: "false"}.__getitem__


def _holds(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _most_common(values: Iterable[int]) -> int | None:
    # The commonest, not the first: one odd tensor is its own fault, not config.json's.
    ranking = Counter(values).most_common(1)
    return ranking[0][0] if ranking else None
