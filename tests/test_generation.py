"""The decode loop: any company, any split of the prompt and any interruption, the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jamba_lm.continuation import GeneratedToken, Request, require_prompt
from jamba_lm.errors import InputError
from jamba_lm.generation import generate, generate_batch, read_ids
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.sampling import Sampling
from jamba_lm.stepper import Stepper
from jamba_lm.text.tokenizer import load_tokenizer
from tests.arms import ARMS, SMALL, random_ids, shaken_model
from tests.tiny_checkpoint import EOS_ID, TINY_TEXT


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return shaken_model(SMALL)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
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


@pytest.mark.parametrize("arm", ARMS)
def test_greedy_tokens_are_the_likeliest_after_the_whole_text_so_far(arm: str):
    model = shaken_model(ARMS[arm])
    prompt = random_ids(SMALL, 7)
    found = ids_of(generate(model, prompt, max_new_tokens=12))
    read = list(prompt)
    for token in found:
        assert token == int(model.logits([read])[0][-1].argmax())
        read.append(token)


@pytest.mark.parametrize("prefill_tokens", [1, 2, 3, 4, 7, 64, 1000])
def test_a_prompt_may_be_read_in_pieces_of_any_length(model, calls, prefill_tokens: int):
    prompt = random_ids(SMALL, 65)
    expected = ids_of(generate(model, prompt, max_new_tokens=8))
    calls.clear()
    found = ids_of(generate(model, prompt, max_new_tokens=8, prefill_tokens=prefill_tokens))
    assert found == expected
    pieces = [count for (count,) in calls[: -(-65 // prefill_tokens)]]
    assert sum(pieces) == 65
    assert max(pieces) <= prefill_tokens
    assert calls[len(pieces) :] == [[1]] * 7


REQUESTS = [
    Request(prompt_ids=random_ids(SMALL, 1, seed=1), max_new_tokens=9),
    Request(
        prompt_ids=random_ids(SMALL, 40, seed=2),
        max_new_tokens=4,
        sampling=Sampling(temperature=1.0, seed=7),
    ),
    Request(
        prompt_ids=random_ids(SMALL, 5, seed=3),
        max_new_tokens=12,
        sampling=Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=7),
        num_logprobs=2,
    ),
    Request(
        prompt_ids=random_ids(SMALL, 17, seed=4),
        max_new_tokens=6,
        sampling=Sampling(temperature=1.3, top_k=20, frequency_penalty=0.5, seed=8),
    ),
]


@pytest.mark.parametrize("prefill_tokens", [3, 16, 512])
def test_company_changes_nothing(model, prefill_tokens: int):
    alone = [
        ids_of(
            token for _, token in generate_batch(model, [request], prefill_tokens=prefill_tokens)
        )
        for request in REQUESTS
    ]
    together: dict[int, list[int]] = {index: [] for index in range(len(REQUESTS))}
    for index, token in generate_batch(model, REQUESTS, prefill_tokens=prefill_tokens):
        together[index].append(token.id)
    assert list(together.values()) == alone


def test_every_sequence_leaves_when_it_is_done_and_nothing_is_padded(model, calls):
    requests = [
        Request(prompt_ids=[5] * length, max_new_tokens=count)
        for length, count in [(3, 2), (10, 4), (4, 1)]
    ]
    finished = [
        (index, token.finish_reason)
        for index, token in generate_batch(model, requests, prefill_tokens=8)
        if token.finish_reason
    ]
    assert calls == [
        [3, 4],  # the second prompt is longer than the room left, the third is not
        [1, 8],  # the first goes on; the third has left
        [2],
        [1],
        [1],
        [1],
    ]
    assert finished == [(2, "length"), (0, "length"), (1, "length")]


def test_a_state_is_continued_and_left_before_the_last_token(model):
    prompt = random_ids(SMALL, 9)
    whole = ids_of(generate(model, prompt, max_new_tokens=10))
    state = model.new_state()
    first = ids_of(generate(model, prompt, max_new_tokens=4, state=state))
    assert state.ids == prompt + first[:-1]
    second = ids_of(generate(model, first[-1:], max_new_tokens=6, state=state))
    assert first + second == whole


def test_the_repetition_penalty_sees_what_the_state_has_read(model):
    state = model.new_state()
    read_ids(model, [7, 8, 9], state)
    sampling = Sampling(repetition_penalty=5.0)
    continued = ids_of(generate(model, [10], max_new_tokens=6, sampling=sampling, state=state))
    fresh = ids_of(generate(model, [7, 8, 9, 10], max_new_tokens=6, sampling=sampling))
    assert continued == fresh


def test_a_seed_gives_the_same_tokens_and_another_one_others(model):
    def sample(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return ids_of(generate(model, [3], max_new_tokens=20, sampling=sampling))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_stop_id_is_the_last_token(model):
    tokens = ids_of(generate(model, [3, 4], max_new_tokens=20))
    stop = tokens[5]
    found = list(generate(model, [3, 4], max_new_tokens=20, stop_ids=[stop, 10**6]))
    assert ids_of(found) == tokens[: tokens.index(stop) + 1]
    assert found[-1].finish_reason == "stop_id"
    assert all(token.finish_reason is None for token in found[:-1])


def test_log_probabilities_are_those_of_the_model(model):
    prompt = [3, 4, 5]
    sampling = Sampling(temperature=2.0, top_k=5, seed=0)
    found = list(generate(model, prompt, max_new_tokens=4, sampling=sampling, num_logprobs=3))
    read = list(prompt)
    for token in found:
        expected = model.logits([read])[0][-1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(token.logprob), expected[token.id])
        assert [top for top, _ in token.top_logprobs] == expected.topk(3).indices.tolist()
        read.append(token.id)
    assert next(generate(model, prompt)).logprob is None


def test_reading_may_be_stopped_between_pieces_and_taken_up_again(model):
    prompt = random_ids(SMALL, 50)
    state = model.new_state()

    def stop_after_20(done: int, total: int) -> None:
        assert total == 50
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(model, prompt, state=state, prefill_tokens=8, on_prefill=stop_after_20))
    assert state.ids == prompt[:24]
    rest = ids_of(generate(model, prompt[24:], max_new_tokens=5, state=state))
    assert rest == ids_of(generate(model, prompt, max_new_tokens=5))


def test_a_prompt_is_checked_whole_before_any_of_it_is_read(model, calls):
    state = model.new_state()
    prompt = [*random_ids(SMALL, 2000), SMALL.vocab_size]
    with pytest.raises(InputError, match=r"prompt id 2000 is 97, .* 0\.\.96"):
        generate(model, prompt, state=state)
    with pytest.raises(InputError, match="prompt id 2000"):
        read_ids(model, prompt, state)
    assert calls == []
    assert state.num_tokens == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [-1]}, "out of range"),
        ({"prompt_ids": "text"}, "expected an int"),
        ({"prompt_ids": [1.5]}, "expected an int"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"stop_strings": ["x"]}, "tokenizer"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_first_token_is_asked_for(
    model, arguments: dict, message: str
):
    with pytest.raises(InputError, match=message):
        generate(model, **{"prompt_ids": [1], **arguments})


ODD_IDS = st.one_of(
    st.integers(),
    st.integers(-3, 100),
    st.floats(),
    st.text(max_size=3),
    st.none(),
    st.lists(st.integers(), max_size=2),
    st.just(10**5000),
)


@settings(max_examples=1000)
@given(ids=st.lists(ODD_IDS, max_size=5) | st.text(max_size=5) | st.binary(max_size=5))
def test_ids_are_read_or_refused_in_one_line(ids):
    try:
        checked = require_prompt(ids, SMALL.vocab_size)
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 200
    else:
        assert checked == list(ids)
        assert all(type(token) is int and 0 <= token < SMALL.vocab_size for token in checked)


def test_ids_may_come_from_an_array(model):
    expected = ids_of(generate(model, [5, 6, 7], max_new_tokens=4))
    for ids in (torch.tensor([5, 6, 7]), np.array([5, 6, 7])):
        assert ids_of(generate(model, ids, max_new_tokens=4)) == expected


def test_a_state_cannot_serve_two_requests(model):
    request = Request(prompt_ids=[1], state=model.new_state())
    with pytest.raises(InputError, match="fork"):
        generate_batch(model, [request, replace(request, prompt_ids=[2])])
    with pytest.raises(InputError, match="no requests"):
        generate_batch(model, [])


# Text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load(tiny_checkpoint), load_tokenizer(tiny_checkpoint)


def speak(tiny, seed: int, **arguments) -> list[GeneratedToken]:
    model, tokenizer = tiny
    return list(
        generate(
            model,
            tokenizer.encode("Once upon a time"),
            sampling=Sampling(temperature=1.2, seed=seed),
            tokenizer=tokenizer,
            **{"max_new_tokens": 60, **arguments},
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_streamed_text_is_the_text_and_never_half_a_character(tiny, seed: int):
    """A random model draws bytes of characters in any order, so halves abound."""
    tokens = speak(tiny, seed)
    whole = tiny[1].decode(ids_of(tokens))
    assert "".join(token.text for token in tokens) == whole
    assert "�" in whole, "this seed says nothing about broken characters"
    shown = ""
    for token in tokens:
        shown += token.text
        assert whole.startswith(shown)


@pytest.mark.parametrize("seed", range(5))
def test_the_text_ends_before_a_stop_string(tiny, seed: int):
    whole = "".join(token.text for token in speak(tiny, seed))
    stop = whole[20:23]
    tokens = speak(tiny, seed, stop_strings=[stop, "never said by anyone"])
    assert "".join(token.text for token in tokens) == whole[: whole.find(stop)]
    assert tokens[-1].finish_reason == "stop_string"


def test_a_stop_id_has_no_text_but_frees_what_was_held(tiny):
    tokens = speak(tiny, 0)
    stop = tokens[10].id
    expected = tokens[: ids_of(tokens).index(stop)]
    # Every prefix of this stop string is held back until it is certain that it does not come.
    last_letters = tiny[1].decode(ids_of(expected))[-2:]
    found = speak(tiny, 0, stop_ids=[stop], stop_strings=[last_letters + "\0never"])
    assert "".join(token.text for token in found) == tiny[1].decode(ids_of(expected))
    assert found[-1].id == stop


def test_the_same_text_comes_out_of_a_batch(tiny):
    model, tokenizer = tiny
    requests = [
        Request(
            prompt_ids=tokenizer.encode(text),
            max_new_tokens=30,
            sampling=Sampling(temperature=1.0, seed=seed),
            stop_ids=[EOS_ID],
            stop_strings=["\n"],
        )
        for seed, text in enumerate(TINY_TEXT.splitlines())
    ]
    alone = [
        "".join(token.text for _, token in generate_batch(model, [request], tokenizer=tokenizer))
        for request in requests
    ]
    together = [""] * len(requests)
    for index, token in generate_batch(model, requests, tokenizer=tokenizer):
        together[index] += token.text
    assert together == alone


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    config = transformers.JambaConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        initializer_range=0.15,
        mamba_dt_rank=5,
        eos_token_id=None,
    )
    theirs = transformers.JambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    prompt = random_ids(SMALL, 20)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, use_cache=True
    )
    ours = load(tmp_path / "model")
    found = ids_of(generate(ours, prompt, max_new_tokens=40, prefill_tokens=6))
    assert found == expected[0, len(prompt) :].tolist()
    assert len(set(found)) > 5, "a model that repeats one token agrees too easily"
