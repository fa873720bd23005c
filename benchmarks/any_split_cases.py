"""The ways of cutting text that `any_split.py` compares, each for transformers and for us.

Every function reads text in one way and returns its largest difference from reading it whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.any_split_models import Bench, Ids


@dataclass(frozen=True)
class Case:
    """One way of cutting text.

    Attributes:
        name: what is done, in words.
        peer_call: how it is said in transformers.
        call: how it is said here.
        peer: does it with transformers; returns the difference, or raises when refused.
        ours: does it here; returns the difference.
    """

    name: str
    peer_call: str
    call: str
    peer: Callable[[Bench], float]
    ours: Callable[[Bench], float]


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest expected logit."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


def pieces(ids: Ids, size: int) -> Iterator[Ids]:
    """Cut `ids` into pieces of `size` tokens, the last one shorter."""
    for first in range(0, len(ids), size):
        yield ids[first : first + size]


# Whole, and one token at a time.


def peer_whole(bench: Bench) -> float:
    """Read each prompt in one call."""
    return max(difference(bench.ask([ids])[0], bench.answer(ids)) for ids in bench.prompts)


def our_whole(bench: Bench) -> float:
    """Read each prompt in one call."""
    return max(difference(bench.model.logits([ids])[0], bench.answer(ids)) for ids in bench.prompts)


def peer_in_pieces(size: int, start: int = 0) -> Callable[[Bench], float]:
    """Feed every prompt in pieces, after a first one of `start` tokens."""

    def run(bench: Bench) -> float:
        worst = 0.0
        for ids in bench.prompts:
            cache = DynamicCache(config=bench.peer.config)
            cut = [ids[:start]] if start else []
            cut += pieces(ids[start:], size)
            logits = [bench.ask([piece], past_key_values=cache)[0] for piece in cut]
            worst = max(worst, difference(torch.cat(logits), bench.answer(ids)))
        return worst

    return run


def our_in_pieces(size: int, start: int = 0) -> Callable[[Bench], float]:
    """Feed every prompt in pieces, after a first one of `start` tokens."""

    def run(bench: Bench) -> float:
        worst = 0.0
        for ids in bench.prompts:
            state = bench.model.new_state()
            cut = [ids[:start]] if start else []
            cut += pieces(ids[start:], size)
            logits = [bench.model.logits([piece], [state])[0] for piece in cut]
            worst = max(worst, difference(torch.cat(logits), bench.answer(ids)))
        return worst

    return run


def peer_prefill_chunk(bench: Bench) -> float:
    """Ask `generate` itself to read the prompt in chunks."""
    ids = bench.prompts[0]
    return difference(bench.first_logits(ids, prefill_chunk_size=5), bench.answer(ids)[-1:])


# A conversation: the second turn continues what the first one left.


def peer_second_turn(bench: Bench) -> float:
    """Keep the cache of the first turn and generate from the whole text, as documented."""
    first, second = bench.prompts[0], bench.branches[0]
    cache = DynamicCache(config=bench.peer.config)
    bench.ask([first], past_key_values=cache)
    logits = bench.first_logits(first + second, past_key_values=cache)
    return difference(logits, bench.answer(first + second)[-1:])


def our_second_turn(bench: Bench) -> float:
    """Keep the state of the first turn and read the second."""
    first, second = bench.prompts[0], bench.branches[0]
    state = bench.model.new_state()
    bench.model.next_logits([first], [state])
    logits = bench.model.next_logits([second], [state])
    return difference(logits, bench.answer(first + second)[-1:])


# Prompts of different lengths in one call, then three steps of decoding together.


def peer_padded(side: str) -> Callable[[Bench], float]:
    """Pad a batch on one side, then decode."""

    def run(bench: Bench) -> float:
        prompts, tails = bench.prompts[:2], [ids[:3] for ids in bench.branches]
        width = max(map(len, prompts))
        rows, masks = [], []
        for ids in prompts:
            pad = [0] * (width - len(ids))
            ones = [1] * len(ids)
            rows.append(pad + ids if side == "left" else ids + pad)
            masks.append(pad + ones if side == "left" else ones + pad)
        cache = DynamicCache(config=bench.peer.config)
        mask = torch.tensor(masks)
        logits = bench.ask(rows, attention_mask=mask, past_key_values=cache)
        worst = 0.0
        for row, ids in enumerate(prompts):
            first = width - len(ids) if side == "left" else 0
            own = logits[row, first : first + len(ids)]
            worst = max(worst, difference(own, bench.answer(ids)))
        for step in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            logits = bench.ask(
                [[tail[step]] for tail in tails],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            for row, (ids, tail) in enumerate(zip(prompts, tails, strict=True)):
                expected = bench.answer(ids + tail[: step + 1])[-1:]
                worst = max(worst, difference(logits[row], expected))
        return worst

    return run


def our_batch(bench: Bench) -> float:
    """Read a batch without padding, then decode."""
    prompts, tails = bench.prompts[:2], [ids[:3] for ids in bench.branches]
    states = [bench.model.new_state() for _ in prompts]
    logits = bench.model.logits(prompts, states)
    worst = max(
        difference(own, bench.answer(ids)) for own, ids in zip(logits, prompts, strict=True)
    )
    for step in range(3):
        logits = bench.model.logits([[tail[step]] for tail in tails], states)
        for own, ids, tail in zip(logits, prompts, tails, strict=True):
            expected = bench.answer(ids + tail[: step + 1])[-1:]
            worst = max(worst, difference(own, expected))
    return worst


def peer_packed(bench: Bench) -> float:
    """Lay documents end to end and restart the positions at each."""
    row = [one for ids in bench.prompts for one in ids]
    positions = [place for ids in bench.prompts for place in range(len(ids))]
    logits = bench.ask([row], position_ids=torch.tensor([positions]))[0]
    own = logits.split([len(ids) for ids in bench.prompts])
    return max(difference(x, bench.answer(ids)) for x, ids in zip(own, bench.prompts, strict=True))


def our_packed(bench: Bench) -> float:
    """Give the documents as they are: every call lays its sequences end to end."""
    own = bench.model.logits(bench.prompts)
    return max(difference(x, bench.answer(ids)) for x, ids in zip(own, bench.prompts, strict=True))


# One prompt, two ways on.


def peer_fork(size: int) -> Callable[[Bench], float]:
    """Copy the cache and continue each copy in pieces of `size` tokens."""

    def run(bench: Bench) -> float:
        prompt, worst = bench.prompts[0], 0.0
        trunk = DynamicCache(config=bench.peer.config)
        bench.ask([prompt], past_key_values=trunk)
        for branch in bench.branches:
            cache = copy.deepcopy(trunk)
            logits = [bench.ask([x], past_key_values=cache)[0] for x in pieces(branch, size)]
            expected = bench.answer(prompt + branch)[len(prompt) :]
            worst = max(worst, difference(torch.cat(logits), expected))
        return worst

    return run


def our_fork(size: int) -> Callable[[Bench], float]:
    """Fork the state and continue all forks in one call, in pieces of `size` tokens."""

    def run(bench: Bench) -> float:
        prompt = bench.prompts[0]
        trunk = bench.model.new_state()
        bench.model.next_logits([prompt], [trunk])
        states = [trunk.fork() for _ in bench.branches]
        steps = zip(*(pieces(branch, size) for branch in bench.branches), strict=True)
        logits = [bench.model.logits(list(step), states) for step in steps]
        return max(
            difference(
                torch.cat([step[index] for step in logits]),
                bench.answer(prompt + branch)[len(prompt) :],
            )
            for index, branch in enumerate(bench.branches)
        )

    return run


# Read a draft of four tokens, find two of them wrong, go on from the second.


def peer_draft_assisted(bench: Bench) -> float:
    """Let `generate` draft by looking the prompt up."""
    ids = bench.prompts[0]
    return difference(bench.first_logits(ids, prompt_lookup_num_tokens=4), bench.answer(ids)[-1:])


def peer_draft_by_hand(bench: Bench) -> float:
    """Record the past, read the draft, crop the cache, go on one token at a time."""
    prompt, draft, rest = bench.prompts[0], bench.branches[0][:4], bench.branches[1][:2]
    cache: Any = DynamicCache(config=bench.peer.config)
    bench.ask([prompt], past_key_values=cache)
    cache.activate_past_recording()
    bench.ask([draft], past_key_values=cache)
    cache.crop(-2)
    logits = [bench.ask([[one]], past_key_values=cache)[0] for one in rest]
    return difference(torch.cat(logits), bench.answer(prompt + draft[:2] + rest)[-2:])


def our_draft(bench: Bench) -> float:
    """Take a snapshot, read the draft, rewind, read what was accepted."""
    prompt, draft, rest = bench.prompts[0], bench.branches[0][:4], bench.branches[1][:2]
    state = bench.model.new_state()
    bench.model.next_logits([prompt], [state])
    before = state.snapshot()
    drafted = bench.model.logits([draft], [state])[0]
    worst = difference(drafted, bench.answer(prompt + draft)[-4:])
    state.rewind(before)
    logits = bench.model.logits([draft[:2] + rest], [state])[0]
    expected = bench.answer(prompt + draft[:2] + rest)[-4:]
    return max(worst, difference(logits, expected))


def peer_continuous(bench: Bench) -> float:
    """Let transformers batch requests continuously."""
    out = bench.peer.generate_batch(
        inputs=[list(ids) for ids in bench.prompts],
        max_new_tokens=1,
    )
    if not out:
        raise RuntimeError("generate_batch returned nothing")
    return 0.0


def our_mixed(bench: Bench) -> float:
    """Read a new prompt, a piece of another and one decode step in the same call."""
    model = bench.model
    fresh, half, running = bench.prompts
    states = [model.new_state() for _ in bench.prompts]
    model.next_logits([half[:5], running[:-1]], states[1:])
    logits = model.logits([fresh, half[5:], running[-1:]], states)
    return max(
        difference(own, bench.answer(ids)[-len(own) :])
        for own, ids in zip(logits, bench.prompts, strict=True)
    )


CASES = (
    Case("a prompt in one call", "model(ids)", "model.logits([ids])", peer_whole, our_whole),
    Case(
        "a prompt, then one token at a time",
        "model(ids, past_key_values=cache)",
        "model.logits([ids], [state])",
        peer_in_pieces(1, start=5),
        our_in_pieces(1, start=5),
    ),
    Case(
        "a prompt in pieces of 3 tokens",
        "model(ids, past_key_values=cache)",
        "model.logits([ids], [state])",
        peer_in_pieces(3),
        our_in_pieces(3),
    ),
    Case(
        "a prompt in pieces of 64 tokens",
        "model(ids, past_key_values=cache)",
        "model.logits([ids], [state])",
        peer_in_pieces(64),
        our_in_pieces(64),
    ),
    Case(
        "a prompt in pieces, by generate",
        "generate(prefill_chunk_size=5)",
        "model.logits([ids], [state])",
        peer_prefill_chunk,
        our_in_pieces(5),
    ),
    Case(
        "the second turn of a conversation",
        "generate(past_key_values=cache)",
        "model.next_logits([turn], [state])",
        peer_second_turn,
        our_second_turn,
    ),
    Case(
        "a batch of different lengths, then decoding (padded left there)",
        "model(ids, attention_mask=mask)",
        "model.logits(sequences, states)",
        peer_padded("left"),
        our_batch,
    ),
    Case(
        "the same (padded right there)",
        "model(ids, attention_mask=mask)",
        "model.logits(sequences, states)",
        peer_padded("right"),
        our_batch,
    ),
    Case(
        "packed documents",
        "model(ids, position_ids=restarting)",
        "model.logits(documents)",
        peer_packed,
        our_packed,
    ),
    Case(
        "fork, then one token at a time",
        "copy.deepcopy(cache)",
        "state.fork()",
        peer_fork(1),
        our_fork(1),
    ),
    Case(
        "fork, then three tokens at a time",
        "copy.deepcopy(cache)",
        "state.fork()",
        peer_fork(3),
        our_fork(3),
    ),
    Case(
        "draft four tokens, reject two, by generate",
        "generate(prompt_lookup_num_tokens=4)",
        "state.snapshot(), state.rewind()",
        peer_draft_assisted,
        our_draft,
    ),
    Case(
        "draft four tokens, reject two, by hand",
        "cache.crop(-2)",
        "state.snapshot(), state.rewind()",
        peer_draft_by_hand,
        our_draft,
    ),
    Case(
        "a prompt, a piece and a decode step in one call",
        "generate_batch(requests)",
        "model.logits(sequences, states)",
        peer_continuous,
        our_mixed,
    ),
)
