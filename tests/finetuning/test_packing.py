"""Examples in one batch are as each alone: in losses, in gradients, and in what is left to read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jamba_lm.data import IGNORED, Position
from jamba_lm.finetuning.examples import Example
from jamba_lm.finetuning.packing import ExampleStream, batches_in_order, pack_examples
from jamba_lm.model.batch import Batch
from jamba_lm.training.loss import summed_cross_entropy
from jamba_lm.training.output import output_weight
from tests.arms import shaken_model
from tests.tiny_checkpoint import tiny_config
from tests.tolerances import FINETUNING, assert_within


def drawn_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        learned = draw.random(length) < 0.4
        learned[0], learned[-1] = False, True
        ids = draw.integers(6, 400, length).astype(np.int32)
        examples.append(Example(ids, learned))
    return examples


def test_a_row_predicts_what_follows_it_in_its_own_example_if_that_is_learned():
    one = Example(np.array([1, 7, 8, 9], np.int32), np.array([False, False, True, True]))
    other = Example(np.array([1, 5], np.int32), np.array([False, True]))
    packed = pack_examples([one, other])
    assert packed.ids_M.tolist() == [1, 7, 8, 9, 1, 5]
    assert packed.targets_M.tolist() == [IGNORED, 8, 9, IGNORED, 5, IGNORED]
    assert packed.lengths == [4, 2]
    assert packed.num_targets == 3


@pytest.mark.parametrize("dtype", ["fp32"])
def test_packed_examples_learn_what_each_alone_would(dtype):
    """Neither states nor attention leak from one to the next, forwards or backwards."""
    examples = drawn_examples([5, 2, 17, 9])
    model = shaken_model(tiny_config(), dtype=dtype)

    def loss_and_gradients(some: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
        model.decoder.zero_grad(set_to_none=True)
        packed = pack_examples(some)
        hidden = model.decoder(packed.ids_M, Batch.of(packed.lengths), hidden=True)
        total = summed_cross_entropy(hidden, output_weight(model.decoder), packed.targets_M)
        total.backward()
        return total.item(), {
            name: x.grad.clone()
            for name, x in model.decoder.named_parameters()
            if x.grad is not None
        }

    together, gradients = loss_and_gradients(examples)
    alone = [loss_and_gradients([one]) for one in examples]
    assert together == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for name, found in gradients.items():
        expected = sum(one[name] for _, one in alone if name in one)
        assert_within(found, expected, FINETUNING["packed"], name)


def test_every_example_comes_once_an_epoch_and_in_another_order():
    examples = drawn_examples([3, 4, 5, 6, 7, 8, 9])
    whole = sum(len(one.ids) for one in examples)
    stream = ExampleStream(examples, batch_tokens=16, seed=1)
    seen: list[int] = []
    while len(seen) < 3 * whole:
        packed = stream.next()
        assert len(packed.ids_M) <= 16
        seen += packed.ids_M.tolist()
    epochs = [seen[at : at + whole] for at in range(0, 3 * whole, whole)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_reading_goes_on_at_any_batch():
    examples = drawn_examples([3, 4, 5, 6, 7, 8, 9])
    whole = ExampleStream(examples, batch_tokens=20, seed=3)
    for _ in range(12):
        position = whole.position
        again = ExampleStream(
            examples,
            batch_tokens=20,
            seed=3,
            position=Position(**dataclasses.asdict(position)),
        )
        assert torch.equal(again.next().ids_M, whole.next().ids_M)


def test_held_out_examples_come_once_in_order():
    examples = drawn_examples([3, 9, 5, 16, 7])
    found = list(batches_in_order(examples, 16))
    assert [one.lengths for one in found] == [[3, 9], [5], [16], [7]]
    ids = torch.cat([one.ids_M for one in found])
    assert ids.tolist() == np.concatenate([one.ids for one in examples]).tolist()
