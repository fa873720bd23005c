"""A pass in segments has the gradient of the whole pass, wherever it is cut."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jamba_lm.config import JambaConfig
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.routing import balance_loss
from jamba_lm.model.state import SequenceState
from jamba_lm.training import loop
from jamba_lm.training.learner import Learner
from jamba_lm.training.loss import summed_losses
from jamba_lm.training.output import output_weight
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.segments import SegmentedLosses, SegmentedPass, cut_rows
from tests.tolerances import SEGMENTS, assert_within
from tests.training.tiny_run import log_of, write_tiny_run

HYBRID = JambaConfig(
    vocab_size=64,
    d_model=32,
    d_ff=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    dt_rank=5,
    attention_period=4,
    attention_offset=2,
)
ARMS = {
    "hybrid": HYBRID,
    "rotary, tied": HYBRID.replace(position="rope", tie_embeddings=True),
    "attention first and only": HYBRID.replace(attention_period=1, attention_offset=0),
    "dense Mamba": HYBRID.replace(attention_period=9, attention_offset=8, num_experts=1),
}
COEFFICIENTS = {"entropy_coef": 0.1, "z_coef": 0.01, "balance_coef": 0.5}


def decoder_of(config: JambaConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config)
    initialize(decoder, 0)
    return decoder.to(dtype)


def text(config: JambaConfig, rows: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids_M, targets_M = torch.randint(0, config.vocab_size, (2, rows), generator=draw)
    targets_M[::7] = -100
    return ids_M, targets_M


def taken(decoder: Decoder) -> dict[str, Tensor]:
    """Return the gradients by name, and clear them."""
    found = {name: one.grad for name, one in decoder.named_parameters() if one.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return found


def ordinary(decoder: Decoder, lengths: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and its gradients, all rows at once."""
    ids_M, targets_M = text(decoder.config, sum(lengths))
    batch = Batch.of(lengths, routing=[])
    hidden_MD = decoder(ids_M, batch, hidden=True)
    sums = summed_losses(hidden_MD, output_weight(decoder), targets_M, COEFFICIENTS["z_coef"])
    loss = COEFFICIENTS["entropy_coef"] * sums.total
    if batch.routing:
        loss = loss + COEFFICIENTS["balance_coef"] * balance_loss(batch.routing)
    loss.backward()
    return loss.item(), taken(decoder)


def segmented(
    decoder: Decoder, lengths: Sequence[int], rows: int, **how: bool
) -> tuple[SegmentedLosses, float, dict[str, Tensor]]:
    """Return the losses, their weighted sum and its gradients, a segment at a time."""
    ids_M, targets_M = text(decoder.config, sum(lengths))
    losses = SegmentedPass(decoder, rows, **how).backward(ids_M, targets_M, lengths, **COEFFICIENTS)
    loss = COEFFICIENTS["entropy_coef"] * (losses.entropy + COEFFICIENTS["z_coef"] * losses.squares)
    return losses, loss + COEFFICIENTS["balance_coef"] * losses.balance, taken(decoder)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare gradients; one that ought to vanish is rounding of the scale of the others."""
    assert found.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        if float(one.abs().max()) > SEGMENTS["vanishing"] * largest:
            assert_within(found[name], one, tolerance, name)
        else:
            assert float(found[name].abs().max()) <= 2 * SEGMENTS["vanishing"] * largest, name


@pytest.mark.parametrize(
    ("arm", "rows"),
    [*(("hybrid", rows) for rows in (1, 2, 3, 64, 200)), *((arm, 7) for arm in ARMS)],
)
def test_any_cut_gives_the_loss_and_the_gradient_of_the_whole(arm: str, rows: int):
    decoder = decoder_of(ARMS[arm])
    lengths = [9, 1, 16, 3, 4]
    loss, expected = ordinary(decoder, lengths)
    _, found_loss, found = segmented(decoder, lengths, rows)
    assert found_loss == pytest.approx(loss, rel=SEGMENTS["loss"])
    assert_same(found, expected, SEGMENTS["fp32"])


def test_a_pass_of_hours_tells_how_far_it_is():
    decoder, told = decoder_of(HYBRID), list[tuple[int, int]]()
    ids_M, targets_M = text(decoder.config, 20)
    pass_ = SegmentedPass(decoder, 6, progress=lambda *found: told.append(found))
    pass_.backward(ids_M, targets_M, [20], **COEFFICIENTS)
    # Four segments through every layer, and back.
    total = 2 * 4 * len(decoder.blocks)
    assert told == [(done, total) for done in range(1, total + 1)]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(2, 40))
def test_documents_may_lie_in_any_way(lengths: list[int], rows: int):
    decoder = decoder_of(HYBRID)
    loss, expected = ordinary(decoder, lengths)
    _, found_loss, found = segmented(decoder, lengths, rows)
    assert found_loss == pytest.approx(loss, rel=SEGMENTS["loss"])
    assert_same(found, expected, SEGMENTS["fp32"])


def test_in_bfloat16_the_gradient_is_summed_in_float32():
    """So that more cuts do not round it more: each is as near to float32's as the whole pass is."""
    lengths = [150]
    _, exact = ordinary(decoder_of(HYBRID), lengths)
    decoder = decoder_of(HYBRID, torch.bfloat16)
    for rows in (5, 50):
        _, _, found = segmented(decoder, lengths, rows)
        for name, one in exact.items():
            assert found[name].dtype == decoder.get_parameter(name).dtype
            assert_within(found[name].float(), one, SEGMENTS["bf16"], name)


def test_gradients_are_added_to_those_that_are_there():
    decoder = decoder_of(HYBRID)
    _, once = ordinary(decoder, [20, 21])
    for name, one in decoder.named_parameters():
        one.grad = once[name].clone() if name in once else None
    _, _, found = segmented(decoder, [20, 21], 16)
    assert_same(found, {name: 2 * one for name, one in once.items()}, SEGMENTS["fp32"])


def by_definition(decoder: Decoder, lengths: Sequence[int], rows: int) -> dict[str, Tensor]:
    """Return the truncated gradient as it is defined, one ordinary pass for each segment.

    Every segment's own loss, with the state before it as a constant.
    """
    ids_M, targets_M = text(decoder.config, sum(lengths))
    state = SequenceState(decoder.config, torch.float32, str)
    for one in cut_rows(lengths, rows):
        states = [SequenceState(decoder.config, torch.float32, str) for _ in one.lengths]
        if one.continues:
            states[0] = state
        before = states[-1].fork()
        segment_M = ids_M[one.first : one.end]
        hidden_MD = decoder(segment_M, Batch.of(one.lengths, states), hidden=True)
        sums = summed_losses(
            hidden_MD,
            output_weight(decoder),
            targets_M[one.first : one.end],
            COEFFICIENTS["z_coef"],
        )
        (COEFFICIENTS["entropy_coef"] * sums.total).backward()
        with torch.no_grad():
            # Once more without a graph: numbers only cross the cut.
            last = (
                [before]
                if len(one.lengths) == 1
                else [
                    *(SequenceState(decoder.config, torch.float32, str) for _ in one.lengths[1:]),
                    before,
                ]
            )
            if one.continues and len(one.lengths) > 1:
                last[0] = state.fork()
            decoder(segment_M, Batch.of(one.lengths, last), hidden=True)
        state = last[-1]
    return taken(decoder)


@pytest.mark.parametrize("arm", ["attention first and only", "dense Mamba", "hybrid"])
def test_a_truncated_gradient_is_that_of_its_definition(arm: str):
    config = ARMS[arm].replace(num_experts=1)
    decoder = decoder_of(config)
    for lengths, rows in (([50], 8), ([50], 50), ([23, 30], 11)):
        expected = by_definition(decoder, lengths, rows)
        _, _, found = segmented(decoder, lengths, rows, truncated=True)
        assert_same(found, expected, SEGMENTS["fp32"])


def test_truncation_changes_the_gradient_and_not_the_loss():
    decoder = decoder_of(HYBRID)
    _, whole, exact = segmented(decoder, [60], 10)
    _, cut, truncated = segmented(decoder, [60], 10, truncated=True)
    assert cut == pytest.approx(whole, rel=SEGMENTS["loss"])
    name = "blocks.0.mixer.in_proj.weight"
    assert (exact[name] - truncated[name]).abs().max() > 100 * SEGMENTS["fp32"] * exact[
        name
    ].abs().max()


def test_the_last_segment_has_the_gradient_of_a_prompt_that_was_read():
    """One segment and no past: nothing is cut, so truncated and whole are the same bits."""
    decoder = decoder_of(HYBRID)
    _, _, whole = segmented(decoder, [30], 30)
    _, _, truncated = segmented(decoder, [30], 30, truncated=True)
    assert all(torch.equal(whole[name], truncated[name]) for name in whole)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 70))
def test_segments_are_all_rows_once_and_in_order(lengths: list[int], rows: int):
    segments = cut_rows(lengths, rows)
    assert [one.first for one in segments] == list(range(0, sum(lengths), rows))
    assert segments[-1].end == sum(lengths)
    for one, following in pairwise(segments):
        assert one.end == following.first
        assert one.goes_on == following.continues
    assert not segments[0].continues
    assert not segments[-1].goes_on
    for one in segments:
        assert sum(one.lengths) == one.end - one.first
        assert min(one.lengths) > 0


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("segments"))


CUT = ["training.dtype=fp32", "training.segment_tokens=20", "loss.z_coef=0.01"]


def test_a_run_in_segments_learns_what_an_ordinary_run_does(recipe_path: Path, tmp_path: Path):
    whole = Learner(load_recipe(recipe_path, [CUT[0], CUT[2]]), None, tmp_path)
    cut = Learner(load_recipe(recipe_path, CUT), None, tmp_path)
    for _ in range(3):
        (one, seen), (other, expected) = cut.step(watch=True), whole.step(watch=True)
        for name in ("loss", "balance_loss", "z_loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=SEGMENTS["run"]), name
        assert seen["router_load"] == expected["router_load"]
    for name, master in whole.optimizer.masters().items():
        assert_within(cut.optimizer.masters()[name], master, SEGMENTS["run"], name)


@pytest.mark.parametrize("across", ["whole", "truncated"])
def test_a_run_in_segments_resumes_with_the_same_bits(
    recipe_path: Path, tmp_path: Path, across: str
):
    """Nothing crosses from pass to pass, so a checkpoint holds what it always held."""
    changes = [*CUT, f"training.across_segments={across}", "training.steps=6"]
    recipe = load_recipe(recipe_path, changes)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(recipe, whole)

    def stop(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    assert not loop.train(recipe, stopped, report=stop).finished
    assert loop.train(recipe, stopped, resume="always").finished
    assert log_of(stopped) == log_of(whole)
    model = "model/model.safetensors"
    assert (stopped / model).read_bytes() == (whole / model).read_bytes()
