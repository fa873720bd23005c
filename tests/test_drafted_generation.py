"""Drafting changes when a text is there, and never what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.continuation import GeneratedToken, Request
from jamba_lm.drafting.lookup import TOGETHER, LookupDrafter
from jamba_lm.drafting.policy import LONGEST_DRAFT, MOST_ROWS
from jamba_lm.errors import InputError
from jamba_lm.generation import generate, generate_batch
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.model.state import KeyValueState, SequenceState
from jamba_lm.presets import embedded_model_path
from jamba_lm.sampling import Sampling
from jamba_lm.stepper import Stepper
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.tolerances import ANY_SPLIT, assert_within

# A prompt that repeats itself, so that there is something to look up.
REPEATING = random_ids(SMALL, 12, seed=5) * 3
# Penalties that make even a random model repeat itself, at temperatures that make it falter: the
# first is mostly guessed right, the second mostly wrong.
FALTERING = [
    Sampling(temperature=1.5, frequency_penalty=-1.0, seed=2),
    Sampling(temperature=1.0, repetition_penalty=0.15, seed=2),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return shaken_model(SMALL)


@pytest.fixture(scope="module")
def embedded() -> tuple[LanguageModel, Tokenizer]:
    """In float32, in which a near tie is too rare to be met."""
    folder = embedded_model_path()
    return load(folder, dtype="fp32"), load_tokenizer(folder)


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """How many tokens of each sequence every call of the model reads."""
    lengths: list[list[int]] = []
    read = Stepper.read

    def counted(self, sequences, *arguments):
        lengths.append([len(ids) for ids in sequences])
        return read(self, sequences, *arguments)

    monkeypatch.setattr(Stepper, "read", counted)
    return lengths


def ids_of(tokens) -> list[int]:
    return [token.id for token in tokens]


def same(found: list[GeneratedToken], expected: list[GeneratedToken]) -> bool:
    """Compare everything about tokens but what drafting did and the last bits of logarithms."""
    plain = [replace(one, drafting=None, logprob=None, top_logprobs=()) for one in found]
    return plain == [replace(one, logprob=None, top_logprobs=()) for one in expected]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([None, 1, 3, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.15]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.5, -1.5]),
    seed=st.integers(0, 10**6),
)
LENGTHS = st.sampled_from([None, 1, 2, 3, 5, 8, LONGEST_DRAFT])


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=20) | st.just(REPEATING),
    sampling=SAMPLINGS,
    draft_tokens=LENGTHS,
    count=st.integers(1, 24),
    stop_ids=st.lists(st.integers(0, 96), max_size=2),
    prefill_tokens=st.sampled_from([1, 4, 512]),
)
def test_the_tokens_are_those_of_plain_decoding(
    model, prompt, sampling, draft_tokens, count, stop_ids, prefill_tokens
):
    asked = {
        "max_new_tokens": count,
        "sampling": sampling,
        "stop_ids": stop_ids,
        "num_logprobs": 2,
        "prefill_tokens": prefill_tokens,
    }
    expected = list(generate(model, prompt, **asked))
    state = model.new_state()
    found = []
    for token in generate(
        model, prompt, state=state, draft="lookup", draft_tokens=draft_tokens, **asked
    ):
        found.append(token)
        # Nothing is ever read that was not given out.
        read = [*prompt, *ids_of(found[:-1])]
        assert state.ids == read[: state.num_tokens]
    assert same(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprob), torch.tensor(theirs.logprob))
    assert state.ids == [*prompt, *ids_of(expected)[:-1]]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("draft_tokens", [1, 4, LONGEST_DRAFT])
def test_every_arm_rolls_its_state_back(arm: str, draft_tokens: int):
    model = shaken_model(ARMS[arm])
    proposed = accepted = 0
    for sampling in FALTERING:
        asked = {"max_new_tokens": 40, "sampling": sampling}
        expected = list(generate(model, REPEATING, **asked))
        found = list(generate(model, REPEATING, draft="lookup", draft_tokens=draft_tokens, **asked))
        assert same(found, expected)
        proposed += found[-1].drafting.proposed
        accepted += found[-1].drafting.accepted
    assert 0 < accepted < proposed, "nothing was accepted, or nothing rolled back"


TEXTS = [
    "My fellow citizens, the state of the Union is strong. My fellow citizens, the state of",
    "And God said, Let there be light: and there was light. And God said, Let there be",
    "HAMLET. To be, or not to be, that is the question.\nHAMLET. To be, or not",
]


@settings(max_examples=10)
@given(
    text=st.sampled_from(TEXTS),
    sampling=SAMPLINGS,
    draft_tokens=LENGTHS,
    stop=st.sampled_from([(), (".",), ("the", "\n"), (" of the",)]),
)
def test_the_embedded_model_says_the_same(embedded, text, sampling, draft_tokens, stop):
    model, tokenizer = embedded
    asked = {
        "max_new_tokens": 24,
        "sampling": sampling,
        "stop_strings": stop,
        "stop_ids": tokenizer.eos_ids,
        "tokenizer": tokenizer,
    }
    prompt = tokenizer.encode(text)
    expected = list(generate(model, prompt, **asked))
    drafted = generate(model, prompt, draft="lookup", draft_tokens=draft_tokens, **asked)
    assert same(list(drafted), expected)


def test_the_embedded_model_gets_its_guesses_right_where_it_repeats(embedded):
    model, tokenizer = embedded
    prompt = tokenizer.encode(TEXTS[1] * 3)
    found = list(generate(model, prompt, max_new_tokens=60, draft="lookup", draft_tokens=8))
    counts = found[-1].drafting
    assert counts.accepted > 20
    assert counts.calls < 45


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_native_step_makes_long_texts_the_same_to_the_last_bit(text: str, dtype: str):
    """What a row gives does not depend on the others, so not even bfloat16 changes a token."""
    folder = embedded_model_path()
    model, tokenizer = load(folder, dtype=dtype), load_tokenizer(folder)
    if model.why_not_step() is not None:
        pytest.skip(f"no native step here: {model.why_not_step()}")
    assert MOST_ROWS <= STEP_ROWS
    asked = {
        "max_new_tokens": 120,
        # What was said becomes likelier, so that there is something to quote.
        "sampling": Sampling(temperature=0.6, frequency_penalty=-0.5, seed=4),
        "num_logprobs": 1,
    }
    prompt = tokenizer.encode(text)
    expected = list(generate(model, prompt, **asked))
    found = list(generate(model, prompt, draft="lookup", draft_tokens=6, **asked))
    assert [replace(token, drafting=None) for token in found] == expected
    assert found[-1].drafting.accepted > 0


def requests(**changes) -> list[Request]:
    sampling = [Sampling(), *FALTERING]
    return [
        Request(
            prompt_ids=REPEATING[: 36 - 7 * number],
            max_new_tokens=12 + 9 * number,
            sampling=sampling[number % 3],
            **changes,
        )
        for number in range(5)
    ]


@pytest.mark.parametrize("draft_tokens", [None, 1, 6])
@pytest.mark.parametrize("prefill_tokens", [5, 512])
def test_company_changes_nothing(model, draft_tokens, prefill_tokens: int):
    drafted = requests(draft="lookup", draft_tokens=draft_tokens)
    drafted[1] = replace(drafted[1], draft=None, draft_tokens=None)
    together: dict[int, list[GeneratedToken]] = {index: [] for index in range(5)}
    for index, token in generate_batch(model, drafted, prefill_tokens=prefill_tokens):
        together[index].append(token)
    for index, request in enumerate(requests()):
        expected = [token for _, token in generate_batch(model, [request])]
        assert same(together[index], expected), index
    assert together[1][-1].drafting is None
    if draft_tokens == 6:
        counts = [together[index][-1].drafting for index in (0, 2, 3, 4)]
        assert 0 < sum(one.accepted for one in counts) < sum(one.proposed for one in counts)


def test_a_call_reads_what_was_accepted_again_in_front_of_the_next_draft(model, calls):
    asked = {"max_new_tokens": 60, "sampling": FALTERING[1]}
    tokens = list(generate(model, REPEATING, draft="lookup", draft_tokens=4, **asked))
    counts = tokens[-1].drafting
    assert len(calls) == counts.calls < len(tokens)
    rows = sum(count for (count,) in calls)
    # The prompt, each token but the last, and what was drafted for nothing or read twice.
    assert rows > len(REPEATING) + len(tokens) - 1
    assert max(count for (count,) in calls[1:]) > 5, "no rejection was followed by a draft"


def test_the_counts_grow_with_the_calls_and_end_with_all_of_them(model, calls):
    tokens = list(generate(model, REPEATING, max_new_tokens=40, draft="lookup", draft_tokens=3))
    counts = [token.drafting for token in tokens]
    assert [one.calls for one in counts] == sorted(one.calls for one in counts)
    assert counts[-1].calls == len(calls)
    assert counts[-1].calls + counts[-1].accepted == len(tokens)


@pytest.fixture
def looked_after(monkeypatch) -> list[int]:
    """How many tokens a sequence had written since it was last looked at, for every later look."""
    found: list[int] = []
    written: dict[int, int] = {}
    wish, push = LookupDrafter.wish, LookupDrafter.push

    def counted_wish(self, *arguments):
        if not self.tokens_to_rest:
            found.extend([written[id(self)]] if id(self) in written else [])
            written[id(self)] = 0
        return wish(self, *arguments)

    def counted_push(self, token):
        if id(self) in written:
            written[id(self)] += 1
        push(self, token)

    monkeypatch.setattr(LookupDrafter, "wish", counted_wish)
    monkeypatch.setattr(LookupDrafter, "push", counted_push)
    return found


@pytest.mark.parametrize("prompt_lengths", [(30,), (30, 21), (30, 21, 12)])
def test_text_that_repeats_nothing_is_left_alone_for_some_calls_and_no_longer(
    model, looked_after, prompt_lengths
):
    # Beside the others one that never drafts. Prompts are read one after the other, so that
    # sequences come to rest in different calls.
    free = Sampling(temperature=50.0, seed=1)
    prompts = [random_ids(SMALL, length, seed=length) for length in prompt_lengths]
    asked = [
        Request(prompt_ids=ids, max_new_tokens=100, sampling=free, draft="lookup")
        for ids in prompts
    ]
    asked.append(Request(prompt_ids=prompts[0], max_new_tokens=100, sampling=free))
    list(generate_batch(model, asked, prefill_tokens=7))
    assert max(looked_after) == TOGETHER
    assert looked_after.count(TOGETHER) >= 5 * len(prompts)


def test_no_draft_is_longer_than_what_may_still_be_written(model, calls):
    for count in (1, 2, 3):
        calls.clear()
        list(generate(model, REPEATING, max_new_tokens=count, draft="lookup", draft_tokens=8))
        assert all(rows <= count for (rows,) in calls[1:])


def test_an_answer_given_up_in_the_middle_can_be_gone_on_with(model):
    """Whatever was drafted beyond, the state has read a part of what was given out."""
    asked = {"sampling": FALTERING[0], "draft": "lookup", "draft_tokens": 5}
    expected = ids_of(generate(model, REPEATING, max_new_tokens=30, sampling=FALTERING[0]))
    for taken in range(1, 24, 2):
        state = model.new_state()
        tokens = generate(model, REPEATING, max_new_tokens=30, state=state, **asked)
        given = [next(tokens).id for _ in range(taken)]
        tokens.close()
        whole = [*REPEATING, *given]
        assert state.ids == whole[: state.num_tokens]
        assert state.num_tokens < len(whole)
        assert given == expected[:taken]
        # Draws are counted from the start of a request, so only what it has read can be compared.
        again = model.new_state()
        model.next_logits([state.ids], [again])
        unread = whole[state.num_tokens :]
        found, wanted = (model.logits([unread], [one])[0] for one in (state, again))
        assert_within(found, wanted, ANY_SPLIT["fp32"])


def test_failed_drafts_leave_no_blocks_behind(model):
    """A fork that is kept makes its origin open a block of its own; a discarded one must not."""

    def blocks(state: SequenceState) -> list[int]:
        layers = [layer for layer in state.layers if isinstance(layer, KeyValueState)]
        return [len(layer.key_blocks()) for layer in layers]

    plain, drafted = model.new_state(), model.new_state()
    asked = {"max_new_tokens": 100, "sampling": FALTERING[1]}
    list(generate(model, REPEATING, state=plain, **asked))
    tokens = list(
        generate(model, REPEATING, state=drafted, draft="lookup", draft_tokens=3, **asked)
    )
    counts = tokens[-1].drafting
    assert counts.proposed - counts.accepted > 20, "too few failed to show anything"
    # A draft that did not fit may have begun the next block a few tokens early.
    assert max(blocks(drafted)) <= max(blocks(plain)) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": "oracle"}, "draft is 'oracle': expected lookup"),
        ({"draft": ""}, "draft is '': expected lookup"),
        ({"draft_tokens": 3}, "without draft"),
        ({"draft": "lookup", "draft_tokens": 0}, "draft_tokens is 0: expected 1 to"),
        ({"draft": "lookup", "draft_tokens": LONGEST_DRAFT + 1}, "expected 1 to"),
    ],
    ids=str,
)
def test_what_cannot_be_drafted_is_refused_at_once(model, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        generate(model, [1], **arguments)
