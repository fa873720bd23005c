"""The rules that pick a token: each one alone and all together, against transformers'."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jamba_lm.errors import InputError, JambaError
from jamba_lm.sampling import (
    CDF_BLOCK,
    Sampler,
    Sampling,
    inverse_cdf,
    log_probabilities,
    uniform,
)
from tests.tolerances import SAMPLING, assert_within

VOCAB = 700
FIELDS = [field.name for field in fields(Sampling)]
PROMPT = [3, 99, 4, 3, 650]


def some_logits(seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def probabilities(sampling: Sampling, logits_V: torch.Tensor, picked=()) -> torch.Tensor:
    """The distribution of the next token, after `picked` were picked."""
    sampler = Sampler(sampling, len(logits_V), PROMPT)
    for token in picked:
        forced = torch.full_like(logits_V, -1e9)
        forced[token] = 1e9
        assert sampler.pick(forced) == token
    ids_J, weight_J = sampler.candidates(logits_V)
    found = torch.zeros(len(logits_V), dtype=torch.float64)
    found[torch.from_numpy(ids_J)] = torch.from_numpy(weight_J.astype(np.float64))
    return found / found.sum()


def reference(processors: list, logits_V: torch.Tensor, read=PROMPT) -> torch.Tensor:
    scores = LogitsProcessorList(processors)(torch.tensor([read]), logits_V[None].clone())
    return scores[0].double().softmax(-1)


def assert_same_distribution(found: torch.Tensor, expected: torch.Tensor):
    assert torch.equal(found > 0, expected > 0)
    assert_within(found, expected, SAMPLING)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7)),
        ({"temperature": 3.0}, TemperatureLogitsWarper(3.0)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 40}, TopKLogitsWarper(40)),
        ({"top_k": 5000}, TopKLogitsWarper(5000)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"top_p": 1e-4}, TopPLogitsWarper(1e-4)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.8}, RepetitionPenaltyLogitsProcessor(0.8)),
    ],
    # The default name of an object holds its address, which parallel workers do not share.
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_each_step_is_that_of_transformers(options: dict, processor, seed: int):
    logits_V = some_logits(seed)
    sampling = Sampling(**{"temperature": 1.0, **options})
    assert_same_distribution(probabilities(sampling, logits_V), reference([processor], logits_V))


@pytest.mark.parametrize("seed", range(5))
def test_all_steps_together_are_those_of_transformers(seed: int):
    logits_V = some_logits(seed)
    sampling = Sampling(temperature=0.8, top_k=60, top_p=0.92, min_p=0.01, repetition_penalty=1.2)
    processors = [
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.92),
        MinPLogitsWarper(0.01),
    ]
    picked = [7, 12, 7]
    assert_same_distribution(
        probabilities(sampling, logits_V, picked),
        reference(processors, logits_V, PROMPT + picked),
    )


@given(
    values=st.lists(st.integers(-40, 40), min_size=2, max_size=40),
    top_p=st.floats(0.01, 0.99),
)
def test_top_p_keeps_the_fewest_that_reach_it_even_among_ties(values: list[int], top_p: float):
    logits_V = torch.tensor(values, dtype=torch.float32) / 8
    found = probabilities(Sampling(temperature=1.0, top_p=top_p), logits_V)
    whole = logits_V.double().softmax(-1)
    by_likelihood = sorted(range(len(values)), key=lambda token: (-values[token], token))
    num_kept = int((found > 0).sum())
    assert set(torch.nonzero(found > 0).flatten().tolist()) == set(by_likelihood[:num_kept])
    slack = 1e-6  # the probabilities are float32
    assert float(whole[by_likelihood[:num_kept]].sum()) >= top_p - slack
    assert float(whole[by_likelihood[: num_kept - 1]].sum()) < top_p + slack


def test_presence_and_frequency_penalties_are_taken_from_the_tokens_of_the_answer_only():
    logits_V = some_logits()
    sampling = Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = probabilities(sampling, logits_V, picked=[7, 12, 7])
    expected = logits_V.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[12] -= 0.5 + 0.25
    assert_same_distribution(found, expected.double().softmax(-1))


def test_greedy_takes_the_largest_logit_and_the_first_of_equals():
    logits_V = torch.tensor([0.0, 5.0, 1.0, 5.0])
    assert Sampler(Sampling(), 4).pick(logits_V) == 1


def test_penalties_count_for_a_greedy_choice():
    logits_V = torch.tensor([0.0, 5.0, 4.0])
    sampler = Sampler(Sampling(frequency_penalty=2.0), 3)
    assert [sampler.pick(logits_V) for _ in range(4)] == [1, 2, 1, 2]
    assert Sampler(Sampling(repetition_penalty=2.0), 3, [1]).pick(logits_V) == 2


def test_the_logits_are_left_as_they_were():
    logits_V = some_logits()
    before = logits_V.clone()
    sampling = Sampling(
        temperature=0.5, top_p=0.9, repetition_penalty=1.5, presence_penalty=1.0, seed=0
    )
    sampler = Sampler(sampling, VOCAB, PROMPT)
    for _ in range(5):
        sampler.pick(logits_V)
    assert torch.equal(logits_V, before)


def test_a_low_temperature_is_the_greedy_choice_and_does_not_overflow():
    logits_V = some_logits() * 1e30
    sampling = Sampling(temperature=1e-3, seed=1)
    assert Sampler(sampling, VOCAB).pick(logits_V) == int(logits_V.argmax())


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.0, math.log(2), -math.inf, math.log(5)])
    sampler = Sampler(Sampling(temperature=1.0, seed=11), 4)
    count = 8000
    times = Counter(sampler.pick(logits_V) for _ in range(count))
    assert times[2] == 0
    for token, share in ((0, 1 / 8), (1, 2 / 8), (3, 5 / 8)):
        # Five standard deviations of a binomial count.
        assert abs(times[token] - share * count) < 5 * math.sqrt(share * (1 - share) * count)


def test_a_draw_depends_on_the_seed_and_its_index_alone():
    logits_V = some_logits()
    sampling = Sampling(temperature=1.0, seed=5)
    whole = Sampler(sampling, VOCAB)
    tokens = [whole.pick(logits_V) for _ in range(6)]
    other_draws = Sampler(Sampling(temperature=2.0, seed=9), VOCAB)
    again = Sampler(sampling, VOCAB)
    interleaved = []
    for _ in range(6):
        other_draws.pick(logits_V)
        torch.rand(3)
        interleaved.append(again.pick(logits_V))
    assert interleaved == tokens
    assert len(set(tokens)) > 1
    assert [uniform(5, index) for index in (3, 0)] == [uniform(5, 3), uniform(5, 0)]
    assert uniform(5, 1) != uniform(6, 1) != uniform(6, 2)


def test_the_stream_of_a_seed_never_changes():
    """A seed in somebody's notes must still mean the same text."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(2**63 - 1, 10**6) == 0.3842499713516325


def test_the_numbers_of_a_stream_are_spread_evenly():
    numbers = np.array([uniform(3, index) for index in range(4000)])
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    # Chi-squared with 19 degrees of freedom: 43.8 is its 99.9th percentile.
    assert float(((counts - 200) ** 2 / 200).sum()) < 43.8


def test_without_a_seed_every_sequence_has_its_own_and_says_which():
    one, two = (Sampler(Sampling(temperature=1.0), VOCAB) for _ in range(2))
    assert one.seed != two.seed
    logits_V = some_logits()
    again = Sampler(Sampling(temperature=1.0, seed=one.seed), VOCAB)
    assert [again.pick(logits_V) for _ in range(5)] == [one.pick(logits_V) for _ in range(5)]


@given(
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=3 * CDF_BLOCK).filter(any),
    u=st.integers(0, 2**53 - 1),
)
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(weights: list[int], u: int):
    place = inverse_cdf(np.array(weights, dtype=np.float32), u / 2**53)
    assert weights[place] > 0
    # Small whole numbers are exact in floating point, the product with u is not.
    target = Fraction(u, 2**53) * sum(weights)
    slack = Fraction(1, 2**40)
    assert sum(weights[:place]) <= target + slack
    assert sum(weights[: place + 1]) >= target - slack


@pytest.mark.parametrize("size", [1, CDF_BLOCK - 1, CDF_BLOCK, CDF_BLOCK + 1, 10 * CDF_BLOCK])
def test_the_last_possible_draw_is_the_last_possible_token(size: int):
    weights = np.full(size, 0.1, dtype=np.float32)
    assert inverse_cdf(weights, (2**53 - 1) / 2**53) == size - 1
    weights[size // 2 + 1 :] = 0
    assert inverse_cdf(weights, (2**53 - 1) / 2**53) == size // 2
    assert inverse_cdf(weights, 0.0) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value: float, temperature: float):
    logits_V = some_logits()
    logits_V[5] = value
    with pytest.raises(JambaError, match="not numbers"):
        Sampler(Sampling(temperature=temperature), VOCAB).pick(logits_V)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": 1e-9},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused_by_name(options: dict):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)


ODD_VALUES = st.one_of(
    st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.none(), st.just(10**5000)
)


@settings(max_examples=1000)
@given(options=st.dictionaries(st.sampled_from(FIELDS), ODD_VALUES, max_size=3))
def test_any_options_are_refused_in_one_line_or_pick_a_token(options: dict):
    try:
        sampling = Sampling(**options)
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 200
    else:
        sampler = Sampler(sampling, 20, [3])
        tokens = [sampler.pick(some_logits(vocab_size=20)) for _ in range(3)]
        assert all(0 <= token < 20 for token in tokens)


def test_log_probabilities_are_those_of_the_model_whatever_is_sampled():
    logits_V = some_logits()
    expected = logits_V.double().log_softmax(-1)
    found = log_probabilities(logits_V, picked=17, num_top=4)
    assert_within(torch.tensor(found.picked), expected[17], SAMPLING)
    top = expected.topk(4)
    assert [token for token, _ in found.top] == top.indices.tolist()
    assert_within(torch.tensor([value for _, value in found.top]), top.values, SAMPLING)
    assert log_probabilities(logits_V, 17, 0).top == ()
    assert len(log_probabilities(logits_V, 17, 10_000).top) == VOCAB
