"""How long drafts should be: pure arithmetic on what calls take and how often guesses come true."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.drafting.acceptance import CLASSES, AcceptanceRates
from jamba_lm.drafting.call_times import LIFETIME_A_SIGHT, LIFETIME_CALLS, CallTimes
from jamba_lm.drafting.lookup import IDLE_CALLS, TOGETHER, LookupDrafter
from jamba_lm.drafting.policy import LONGEST_DRAFT, MOST_ROWS, ROWS, DraftPolicy, Wish
from tests.tolerances import DRAFTING

CERTAIN = [1.0] * LONGEST_DRAFT
UNLIKELY = [0.1, 0.01]


# Times -----------------------------------------------------------------------------------------


def test_a_size_between_two_others_is_expected_to_take_a_time_between():
    times = CallTimes()
    times.observe(1, 1.0)
    times.observe(101, 2.0)
    assert times.seconds(1) == 1.0
    assert times.seconds(51) == pytest.approx(1.5)
    assert not times.knows(51)


def test_before_two_sizes_were_seen_more_rows_are_thought_to_take_a_little_longer():
    times = CallTimes()
    assert times.seconds(1) == 0
    times.observe(1, 1.0)
    assert 1.0 < times.seconds(4) < times.seconds(8) < 2.0


def test_one_disturbed_call_is_not_taken_for_the_truth():
    times = CallTimes()
    for _ in range(10):
        times.observe(1, 1.0)
    times.observe(1, 100.0)
    assert times.seconds(1) < 1.2
    times.observe(1, 1.0)
    assert times.seconds(1) < 1.1


def test_a_machine_that_became_slower_is_believed_in_the_end():
    times = CallTimes()
    for seconds in (1.0, 3.0):
        for _ in range(60):
            times.observe(1, seconds)
    assert times.seconds(1) == pytest.approx(3.0, rel=DRAFTING["estimate"])


def test_what_was_not_seen_for_long_is_forgotten():
    times = CallTimes()
    times.observe(1, 1.0)
    for _ in range(LIFETIME_CALLS // LIFETIME_A_SIGHT):
        times.observe(8, 4.0)
    for _ in range(LIFETIME_CALLS):
        assert times.knows(8)
        times.observe(1, 1.0)
    assert not times.knows(8)
    assert times.seconds(8) < 2.0


def test_what_was_seen_once_is_forgotten_sooner():
    """The first calls after a prompt are slow, and say nothing of later ones."""
    times = CallTimes()
    times.observe(1, 2.0)
    times.observe(3, 3.3)
    for _ in range(LIFETIME_CALLS // 4):
        assert times.knows(3)
        times.observe(1, 1.0)
    assert not times.knows(3)
    assert times.seconds(3) < 1.5


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(1e-6, 1e3)), min_size=1, max_size=80))
def test_an_estimate_lies_within_what_was_seen(calls: list[tuple[int, float]]):
    times = CallTimes()
    for rows, seconds in calls:
        times.observe(rows, seconds)
    least, most = (pick(seconds for _, seconds in calls) for pick in (min, max))
    for rows in {rows for rows, _ in calls}:
        assert least * (1 - 1e-9) <= times.seconds(rows) <= most * (1 + 1e-9)


# Acceptance -------------------------------------------------------------------------------------


def test_longer_matches_are_trusted_more_from_the_start():
    rates = AcceptanceRates()
    found = [rates.rate(length) for length in CLASSES]
    assert found == sorted(found)
    assert found == pytest.approx(list(CLASSES.values()))
    assert rates.rate(10**6) == found[-1]


def test_rates_follow_what_happens():
    rates = AcceptanceRates()
    for _ in range(100):
        rates.observe(3, True)
    assert rates.rate(3) > 0.95
    assert rates.rate(2) == pytest.approx(CLASSES[2]), "other lengths are not concerned"
    for _ in range(100):
        rates.observe(3, False)
    assert rates.rate(3) < 0.1


@given(st.integers(2, 100), st.integers(0, LONGEST_DRAFT))
def test_a_longer_draft_is_never_likelier(length: int, count: int):
    chances = AcceptanceRates().chances(length, count)
    assert len(chances) <= count
    assert chances == sorted(chances, reverse=True)
    assert all(0 < chance < 1 for chance in chances)


# Lengths ----------------------------------------------------------------------------------------


def knowing(seconds: Callable[[int], float], sizes=(1, *ROWS)):
    """A policy that has measured calls of these sizes."""
    policy = DraftPolicy()
    policy.observe(1, seconds(1), sequences=1, written=1)
    for rows in sizes:
        for _ in range(20):
            policy.times.observe(rows, seconds(rows))
    return policy


def flat(rows: int) -> float:
    return 1.0 + 0.01 * rows


def half(rows: int) -> float:
    return 0.5 + 0.5 * rows


def proportional(rows: int) -> float:
    return float(rows)


def test_nothing_is_drafted_before_anything_was_measured():
    assert DraftPolicy().choose([Wish(1, CERTAIN)]) == [0]


def test_a_certain_guess_fills_calls_that_take_no_longer():
    (count,) = knowing(flat).choose([Wish(1, CERTAIN)])
    assert count == MOST_ROWS - 1


def test_nothing_is_drafted_where_every_row_costs_as_much_as_a_call():
    assert knowing(proportional).choose([Wish(1, CERTAIN)]) == [0]
    assert knowing(proportional).choose([Wish(1, UNLIKELY)]) == [0]


def test_an_unlikely_guess_is_left_out_unless_it_is_free():
    assert knowing(lambda rows: 1 + 0.2 * (rows - 1)).choose([Wish(1, UNLIKELY)]) == [0]
    assert knowing(lambda rows: 1 + 0.001 * (rows - 1)).choose([Wish(1, UNLIKELY)]) == [2]


def test_the_likelier_the_longer():
    policy = knowing(lambda rows: 1 + 0.1 * (rows - 1))
    counts = [
        policy.choose([Wish(1, [chance**n for n in range(1, LONGEST_DRAFT + 1)])])[0]
        for chance in (0.1, 0.5, 0.8, 0.99)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 10


def test_a_jump_in_the_time_of_a_call_is_not_crossed():
    """As at the end of what a kernel for few rows takes."""
    policy = knowing(lambda rows: 1.0 if rows <= 8 else 6.0)
    assert policy.choose([Wish(1, [0.9**n for n in range(1, LONGEST_DRAFT + 1)])]) == [7]


def test_rows_to_be_read_again_count():
    policy = knowing(flat)
    assert policy.choose([Wish(5, CERTAIN)]) == [MOST_ROWS - 5]
    assert policy.choose([Wish(MOST_ROWS, CERTAIN)]) == [0]


def test_sequences_share_the_rows_of_a_call():
    policy = knowing(flat)
    counts = policy.choose([Wish(1, CERTAIN), Wish(1), Wish(1, [0.9, 0.8, 0.7])])
    assert counts[1] == 0
    assert sum(counts) + 3 <= MOST_ROWS
    assert counts[0] > 8


def test_a_fixed_length_is_obeyed_whatever_it_costs():
    assert knowing(proportional).choose([Wish(1, fixed=7), Wish(1)]) == [7, 0]
    assert DraftPolicy().choose([Wish(12, fixed=7)]) == [MOST_ROWS - 12]
    assert DraftPolicy().choose([Wish(1)] * MOST_ROWS + [Wish(1, fixed=7)])[-1] == 0


def test_drafts_that_keep_failing_are_given_up_and_tried_again_later():
    """Here guesses look certain and never come true, so only the account can tell."""
    policy = knowing(lambda rows: 1 + 0.3 * (rows - 1))
    spent, tokens, last_try = 0.0, 0, 0
    for call in range(3000):
        (count,) = policy.choose([Wish(1, [0.9] * 3)])
        seconds = 1 + 0.3 * count
        policy.observe(1 + count, seconds, sequences=1, written=1)
        spent, tokens, last_try = spent + seconds, tokens + 1, call if count else last_try
    assert spent <= DRAFTING["most lost"] * tokens + DRAFTING["most lost at first"]
    assert last_try > 2000


def test_a_length_that_may_not_be_tried_hides_none_that_is_known():
    policy = knowing(half, sizes=(1, 4, 6))
    # What is left would not pay for finding out what two rows take.
    policy.observe(4, 2.5, sequences=1, written=1)
    (count,) = policy.choose([Wish(1, CERTAIN)])
    assert count >= 3


def test_guesses_that_came_true_pay_debts():
    policy = knowing(half)
    policy.observe(16, half(16), sequences=1, written=1)
    for _ in range(10):
        assert policy.choose([Wish(1, CERTAIN)]) == [0], "it is in debt"
        policy.observe(1, half(1), sequences=1, written=1)
    waited = 0
    while policy.choose([Wish(1, CERTAIN, hits=1)]) == [0]:
        policy.observe(1, half(1), sequences=1, written=1)
        waited += 1
    assert 2 < waited < 15


def test_hits_are_told_once_and_not_of_drafts():
    text = [*range(100, 140)]
    drafter = LookupDrafter([*text, 1, 2, 3, *text[:8]])
    assert drafter.wish(1, 100).hits == 0
    for token in text[8:11]:
        drafter.push(token)
    assert drafter.wish(1, 100).hits == 3
    assert drafter.wish(1, 100).hits == 0
    assert drafter.draft(2) == text[11:13]
    for token in text[11:14]:
        drafter.push(token)
    assert drafter.wish(1, 100).hits == 0, "the draft's tokens are on the account already"
    drafter.push(text[14])
    assert drafter.wish(1, 100).hits == 1
    drafter.push(7)
    assert drafter.wish(1, 100).hits == 0, "it was guessed, and did not come true"


# A whole text against a clock -------------------------------------------------------------------


def simulate(
    prompt: list[int], text: list[int], seconds: Callable[[int], float], *, warm_after: int = 0
) -> float:
    """Return how much faster `text` is written with drafts than without, by the clock `seconds`.

    The calls before `warm_after` take twice as long.
    """
    drafter, policy = LookupDrafter(prompt), DraftPolicy()
    policy.times.observe(512, seconds(512))
    spent, done, unread, calls = 0.0, 0, 1, 0
    while done < len(text):
        rests = drafter.tokens_to_rest > 0
        wish = Wish(unread) if rests else drafter.wish(unread, len(text) - done - 1)
        (count,) = policy.choose([wish])
        draft = drafter.draft(count)
        written = 0
        for guess in [*draft, None]:
            token = text[done]
            drafter.push(token)
            done, written = done + 1, written + 1
            if token != guess or done == len(text):
                break
        rows = unread + len(draft)
        took = seconds(rows) * (2 if calls < warm_after else 1)
        spent, calls = spent + took, calls + 1
        unread = 1 if written == len(draft) + 1 else unread + written
        if not rests:
            policy.observe(rows, took, sequences=1, written=written)
    return (len(text) + warm_after) * seconds(1) / spent


CLOCKS = {
    "waits for weights": lambda rows: 1 + 0.01 * rows,
    "a little longer": lambda rows: 0.93 + 0.07 * rows,
    "half": half,
    "every row": lambda rows: 0.1 + 0.9 * rows,
    "a jump after 6": lambda rows: 1.0 if rows <= 6 else 6 + 0.02 * rows,
}


def prose(count: int, seed: int) -> list[int]:
    """Tokens with the uneven frequencies of words, and pairs that come again by chance only."""
    draw = random.Random(seed)
    return [int(draw.paretovariate(0.6)) % 4000 for _ in range(count)]


@pytest.mark.parametrize("clock", CLOCKS)
def test_free_text_is_hardly_slower_whatever_the_machine(clock: str):
    for seed in range(5):
        text = prose(800, seed)
        assert simulate(text[:300], text[300:], CLOCKS[clock]) >= DRAFTING["free text"]


@pytest.mark.parametrize(
    ("clock", "times"),
    [
        ("waits for weights", 7.0),
        ("a little longer", 4.0),
        ("half", 1.3),
        ("every row", 0.97),
        ("a jump after 6", 3.0),
    ],
)
def test_copied_text_is_as_much_faster_as_the_machine_allows(clock: str, times: float):
    text = prose(500, 1)
    assert simulate(text, text[100:400], CLOCKS[clock]) >= times


@pytest.mark.parametrize("clock", ["waits for weights", "a little longer", "half"])
@pytest.mark.parametrize("first", [4, 8, 12])
def test_a_slow_beginning_is_not_held_against_drafts(clock: str, first: int):
    """Drafts are tried among the first calls, which take longer and of which some fail."""
    text = prose(500, 1)
    misled = [token for start in range(0, 60, 5) for token in (*text[start : start + 4], 4001)]
    written = [*misled[: 5 * first], *text[100:350]]
    found = simulate(text, written, CLOCKS[clock], warm_after=first)
    undisturbed = simulate(text, text[100:350], CLOCKS[clock])
    # The beginning alone at the speed of no drafts, and as much again until they are believed in.
    expected = len(written) / (2 * 5 * first + 250 / undisturbed)
    assert found >= expected


def test_copying_with_changes_pays_as_well():
    draw = random.Random(0)
    text = prose(600, 1)
    edited = [draw.randrange(4000) if draw.random() < 0.04 else token for token in text[100:500]]
    assert simulate(text, edited, CLOCKS["waits for weights"]) >= 3.0
    assert simulate(text, edited, CLOCKS["a little longer"]) >= 1.6


def test_text_that_repeats_nothing_is_looked_at_a_few_tokens_at_a_time():
    drafter = LookupDrafter(range(100))
    looked = []
    for token in range(100, 400):
        if not drafter.tokens_to_rest:
            looked.append(token - 100)
        assert not drafter.wish(1, 100).chances
        drafter.push(token)
    assert looked[:IDLE_CALLS] == list(range(IDLE_CALLS))
    assert {after - one for one, after in pairwise(looked[IDLE_CALLS:])} == {TOGETHER}


def test_what_is_looked_at_late_is_known_all_the_same():
    drafter = LookupDrafter(range(100))
    for token in [*range(100, 200), *range(150, 170)]:
        drafter.wish(1, 100)
        drafter.push(token)
    token = 170
    while drafter.tokens_to_rest:
        assert drafter.draft(0) == []
        drafter.push(token)
        token += 1
    assert token < 170 + TOGETHER
    assert len(drafter.wish(1, 100).chances) == LONGEST_DRAFT
    assert drafter.draft(3) == [token, token + 1, token + 2]
    # A draft was wanted: now every call is looked at again.
    for guess in range(token, token + IDLE_CALLS):
        drafter.push(guess)
        assert not drafter.tokens_to_rest
        assert drafter.wish(1, 100).chances


def test_what_is_copied_in_the_middle_of_free_text_is_noticed_soon():
    text, free = prose(600, 1), prose(400, 2)
    found = simulate(text, free + text[100:300] + free[:50], CLOCKS["waits for weights"])
    # 200 of 650 tokens in 8 calls and a half, and twice as many until it was noticed.
    assert found >= 650 / (450 + 200 / 7 + 2 * TOGETHER)


def test_a_fixed_length_is_looked_up_for_at_every_call():
    text = prose(400, 3)
    drafter = LookupDrafter(text[:100], fixed=4)
    for token in text[100:]:
        assert not drafter.tokens_to_rest
        drafter.wish(1, 100)
        drafter.push(token)
