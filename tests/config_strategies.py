"""Configurations drawn at random: any that are possible, and files that may be none."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from jamba_lm.config import JambaConfig
from jamba_lm.config_json import ALIASES, FIELDS, NO_EFFECT, ONLY, OWN_FIELDS


@st.composite
def configs(draw: st.DrawFn, *, public: bool = False, largest: int = 96) -> JambaConfig:
    """Draw a possible configuration; with `public`, one that transformers reads too."""
    small = st.integers(1, largest)
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads = kv_heads * group
    vocab_size = draw(st.integers(2, 300))
    token = st.integers(0, vocab_size - 1)
    attention_period, expert_period = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    experts = draw(st.sampled_from([1, 2, 3, 16]))
    position = "none" if public else draw(st.sampled_from(["none", "rope"]))
    return JambaConfig(
        vocab_size=vocab_size,
        d_model=draw(st.integers(heads, heads + largest)),
        d_ff=draw(small),
        num_layers=draw(st.integers(1, 12)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        # An even width, because rotary positions need one.
        d_head=2 * draw(st.integers(1, 20)) if position == "rope" else draw(st.none() | small),
        attention_period=attention_period,
        attention_offset=draw(st.integers(0, attention_period - 1)),
        expert_period=expert_period,
        expert_offset=draw(st.integers(0, expert_period - 1)),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        state_size=draw(st.integers(1, 32)),
        conv_width=draw(st.integers(2, 5)),
        expand=draw(st.integers(1, 4)),
        dt_rank=draw(st.none() | small),
        conv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        inner_norms=True if public else draw(st.booleans()),
        position=position,
        rope_theta=draw(st.floats(1.0, 1e6)) if position == "rope" else 10000.0,
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(0.0, 1.0)),
        aux_loss_coef=draw(st.floats(0.0, 1.0)),
        pad_id=draw(st.none() | token),
        bos_id=draw(st.none() | token),
        eos_ids=tuple(draw(st.lists(token, max_size=3))),
        context_length=draw(st.integers(1, 2**20)),
    )


strange_numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, 1, -1, 10**400, -0.0, 1e-300, float("nan"), float("inf")]),
)
json_values = st.recursive(
    st.none() | st.booleans() | strange_numbers | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
known_keys = st.sampled_from(
    [*FIELDS, *OWN_FIELDS, *ALIASES, *NO_EFFECT, *ONLY, "model_type", "layers_block_type"]
)
spoiled_content = st.builds(
    lambda config, changes, dropped: {
        key: value
        for key, value in {**config.to_hf(), **changes}.items()
        if key not in dropped or key == "model_type"
    },
    configs(),
    st.dictionaries(known_keys | st.text(max_size=12), json_values, max_size=3),
    st.sets(known_keys, max_size=2),
)


@st.composite
def config_files(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a file called config.json: good, nearly good, cut short or anything."""
    text = json.dumps(draw(spoiled_content))
    data = text.encode()
    damage = draw(st.sampled_from(["none", "cut", "insert", "bytes"]))
    at = draw(st.integers(0, len(data)))
    if damage == "cut":
        return data[:at]
    if damage == "insert":
        return data[:at] + draw(st.binary(max_size=4)) + data[at:]
    return draw(st.binary(max_size=200)) if damage == "bytes" else data
