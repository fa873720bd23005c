"""A checkpoint that does not fit is explained in the fields of config.json."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.checkpoint.diagnosis import MAX_CLUES, find_clues, shown
from jamba_lm.checkpoint.rename import public_name, public_shape
from jamba_lm.config import JambaConfig
from jamba_lm.model.decoder import Decoder
from tests.checkpoint.folders import TINY


def shapes_of(config: JambaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        parameters = Decoder(config).named_parameters()
    return {public_name(own): public_shape(own, p.shape) for own, p in parameters}


@st.composite
def patterns(draw: st.DrawFn) -> dict[str, int]:
    attention, expert = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return {
        "attention_period": attention,
        "attention_offset": draw(st.integers(0, attention - 1)),
        "expert_period": expert,
        "expert_offset": draw(st.integers(0, expert - 1)),
    }


@settings(max_examples=60)
@given(stored=patterns(), said=patterns(), layers=st.integers(1, 9))
def test_the_pattern_that_is_proposed_fits(
    stored: dict[str, int], said: dict[str, int], layers: int
):
    config = TINY.replace(num_layers=layers, num_experts=2, **stored)
    shapes = shapes_of(config)
    clues = find_clues(config.replace(**said), shapes)
    rules = [clue for clue in clues if "would fit" in clue]
    changes: dict[str, int] = {}
    for rule in rules:
        words = rule.replace(",", "").split("; ")[-1].split()
        kind = "attention" if words[0].startswith("attn") else "expert"
        changes |= {f"{kind}_period": int(words[1]), f"{kind}_offset": int(words[4])}
    if any("router" in name for name in shapes):
        assert shapes_of(config.replace(**said).replace(**changes)) == shapes


def test_a_config_that_fits_gives_no_clue():
    assert find_clues(TINY, shapes_of(TINY)) == []


def test_clues_are_few_however_much_is_wrong():
    other = JambaConfig(num_layers=9, conv_bias=False, proj_bias=True, tie_embeddings=True)
    assert len(find_clues(other, shapes_of(TINY))) == MAX_CLUES


def test_names_out_of_a_file_cannot_break_the_line():
    assert shown("a\nb\x1b[31m\u2028c") == "a\\nb\\x1b[31m\\u2028c"
    assert len(shown("x" * 10_000)) == 80
