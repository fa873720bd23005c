"""What is added to the loss has the gradient it says, in one pass as in several."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from jamba_lm.data import PackedBatch
from jamba_lm.model.batch import Batch
from jamba_lm.training import loss
from jamba_lm.training.activation_loss import ActivationLoss
from jamba_lm.training.learner import Learner
from jamba_lm.training.recipe import Recipe
from jamba_lm.training.recipe_file import load_recipe
from jamba_lm.training.recompute import recompute_layers
from tests.tolerances import TRAINING, assert_within
from tests.training.test_optimizer import tiny_decoder
from tests.training.tiny_run import write_tiny_run

EVERYTHING = ["training.dtype=fp32", "loss.activation_coef=0.1", "loss.z_coef=0.05"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("material"))


def gradient_of(recipe: Recipe, batches: list[PackedBatch], cache: Path) -> dict[str, torch.Tensor]:
    """Return the gradient that a step along `batches` would take, by parameter."""
    learner = Learner(recipe, None, cache)
    learner.gradients(batches)
    return learner.optimizer.gradients()


def packed_pieces(recipe: Recipe, cache: Path) -> PackedBatch:
    return Learner(recipe, None, cache)._stream.next()


def cut(packed: PackedBatch, pieces: list[int]) -> list[PackedBatch]:
    """Cut a batch behind these numbers of its pieces: parts of unequal numbers of targets."""
    parts = []
    for first, end in pairwise([0, *pieces, len(packed.lengths)]):
        rows = slice(sum(packed.lengths[:first]), sum(packed.lengths[:end]))
        lengths = packed.lengths[first:end]
        parts.append(PackedBatch(packed.ids_M[rows], packed.targets_M[rows], lengths))
    return parts


@pytest.mark.parametrize("workers", [1, 2])
def test_passes_of_packed_pieces_give_the_gradient_of_one_large_pass(
    recipe_path, tmp_path, workers
):
    """With the balance, activation and z losses, and passes that predict unequally much."""
    changes = [*EVERYTHING, "model.aux_loss_coef=0.5", "loss.balance_over=step"]
    recipe = load_recipe(recipe_path, [*changes, "training.batch_tokens=96"])
    large = packed_pieces(recipe, tmp_path)
    assert len(large.lengths) >= 4
    parts = cut(large, [1, 3])
    assert len({part.num_targets for part in parts}) > 1
    several = replace(recipe, training=replace(recipe.training, workers=workers, accumulate=2))
    threads = torch.get_num_threads()
    try:
        found = gradient_of(several, parts, tmp_path)
    finally:
        torch.set_num_threads(threads)
    expected = gradient_of(recipe, [large], tmp_path)
    for name, gradient in found.items():
        assert_within(gradient, expected[name], TRAINING["accumulated gradient"], name)


def test_balancing_each_pass_is_another_gradient(recipe_path, tmp_path):
    """The option would be idle if it were not."""
    changes = ["training.dtype=fp32", "model.aux_loss_coef=0.5", "training.batch_tokens=96"]
    recipe = load_recipe(recipe_path, changes)
    large = packed_pieces(recipe, tmp_path)
    router = "blocks.1.feed_forward.router.weight"
    whole = gradient_of(recipe, [large], tmp_path)[router]
    parts = gradient_of(recipe, cut(large, [1, 3]), tmp_path)[router]
    scale = whole.abs().max()
    assert (whole - parts).abs().max() > 100 * TRAINING["accumulated gradient"] * scale


def test_the_activation_loss_is_the_mean_square_of_what_layers_add():
    """Its value and its gradient, against autograd on outputs that were kept."""
    plain, own = tiny_decoder(), tiny_decoder()
    batch = Batch.of([7, 5])
    ids_M = torch.arange(12) % plain.config.vocab_size
    outputs: list[torch.Tensor] = []
    for block in plain.blocks:
        for part in (block.mixer, block.feed_forward):
            part.register_forward_hook(lambda _m, _i, x: outputs.append(x))
    hidden_MD = plain(ids_M, batch, hidden=True)
    mean_square = torch.stack([x.square().mean() for x in outputs]).mean()
    (hidden_MD.square().sum() + 0.7 * 0.5 * mean_square).backward()

    penalty = ActivationLoss(own, 0.7)
    penalty.begin(0.5)
    own(ids_M, batch, hidden=True).square().sum().backward()
    assert penalty.mean_square() == pytest.approx(mean_square.item(), rel=1e-5)
    for (name, expected), found in zip(plain.named_parameters(), own.parameters(), strict=True):
        if expected.grad is not None:
            assert_within(found.grad, expected.grad, TRAINING["penalty"], name)


@pytest.mark.parametrize("rows", [7, 8, 21])
def test_the_z_loss_is_the_square_of_the_log_normaliser(monkeypatch, rows):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 8)
    hidden_MD = torch.randn(rows, 16).requires_grad_()
    weight_VD = torch.randn(40, 16).requires_grad_()
    targets_M = torch.randint(0, 40, (rows,))
    targets_M[1::3] = loss.IGNORED
    sums = loss.summed_losses(hidden_MD, weight_VD, targets_M, 0.3)
    sums.total.backward()

    wide_MD = hidden_MD.detach().double().requires_grad_()
    wide_VD = weight_VD.detach().double().requires_grad_()
    counted = targets_M != loss.IGNORED
    scores_MV = (wide_MD @ wide_VD.T)[counted]
    squares = scores_MV.logsumexp(-1).square().sum()
    entropy = torch.nn.functional.cross_entropy(scores_MV, targets_M[counted], reduction="sum")
    (entropy + 0.3 * squares).backward()
    assert_within(sums.squares, squares.float(), TRAINING["loss fp32"], "squares")
    assert_within(sums.entropy, entropy.float(), TRAINING["loss fp32"], "entropy")
    for own, other in ((hidden_MD, wide_MD), (weight_VD, wide_VD)):
        assert_within(own.grad, other.grad.float(), TRAINING["loss gradient fp32"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_layers_that_run_again_give_the_same_bits(recipe_path, tmp_path, dtype):
    """Also with losses that look at what a layer gives."""
    changes = [*EVERYTHING, f"training.dtype={dtype}"]
    kept = load_recipe(recipe_path, changes)
    again = load_recipe(recipe_path, [*changes, "training.recompute_layers=true"])
    (one, *_), (other, *_) = (Learner(one, None, tmp_path).step() for one in (kept, again))
    assert one == other
    batches = [packed_pieces(kept, tmp_path)]
    expected = gradient_of(kept, batches, tmp_path)
    for name, gradient in gradient_of(again, batches, tmp_path).items():
        assert torch.equal(gradient, expected[name]), name


def test_layers_that_run_again_keep_less():
    def kept_bytes(rewritten: bool) -> int:
        decoder = tiny_decoder()
        if rewritten:
            recompute_layers(decoder)
        sizes: list[int] = []

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            decoder(torch.arange(24) % 50, Batch.of([24]), hidden=True)
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 2
