"""The decoder hands out the rows asked for, and keeps what must stay wide."""

from __future__ import annotations

import pytest
import torch

from jamba_lm.errors import InputError
from jamba_lm.model.batch import Batch
from jamba_lm.model.mamba import MambaMixer
from jamba_lm.model.norm import RMSNorm
from tests.arms import SMALL, random_ids, shaken_model


def test_rows_asked_for_are_the_rows_of_all():
    model = shaken_model(SMALL)
    ids = torch.tensor(random_ids(SMALL, 14))
    batch = Batch.of([4, 1, 9])
    everything = model.decoder(ids, batch)
    torch.testing.assert_close(
        model.decoder(ids, batch, rows="last"), everything[[3, 4, 13]], rtol=1e-5, atol=1e-6
    )
    chosen = torch.tensor([12, 0, 0, 5])
    torch.testing.assert_close(
        model.decoder(ids, batch, rows=chosen), everything[chosen], rtol=1e-5, atol=1e-6
    )
    hidden = model.decoder(ids, batch, hidden=True)
    assert hidden.shape == (14, SMALL.d_model)
    torch.testing.assert_close(model.decoder.logits(hidden), everything)


def test_logits_not_asked_for_are_never_computed():
    model = shaken_model(SMALL)
    widths: list[int] = []
    model.decoder.head.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    ids = torch.tensor([*random_ids(SMALL, 50), 1])
    model.decoder(ids, Batch.of([50, 1]), rows="last")
    assert widths == [2]


def test_ids_that_do_not_fill_the_batch_are_refused():
    model = shaken_model(SMALL)
    with pytest.raises(InputError, match="describes 4 rows"):
        model.decoder(torch.tensor([1, 2, 3]), Batch.of([4]))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_decays_and_skips_stay_float32(narrow: torch.dtype):
    decoder = shaken_model(SMALL).decoder
    order = [name for name, _ in decoder.named_parameters()]
    mixer = next(m for m in decoder.modules() if isinstance(m, MambaMixer))
    decay = mixer.log_decay_CN.detach().clone()
    decoder.to(narrow)
    assert mixer.in_proj.weight.dtype == narrow
    assert mixer.log_decay_CN.dtype == mixer.skip_C.dtype == torch.float32
    torch.testing.assert_close(mixer.log_decay_CN.detach(), decay, rtol=0, atol=0)
    assert [name for name, _ in decoder.named_parameters()] == order
    decoder.double()
    assert mixer.log_decay_CN.dtype == torch.float64


def test_the_norm_rounds_before_the_gain():
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    before = wide.to(torch.bfloat16) * norm.weight
    after = (wide * norm.weight.float()).to(torch.bfloat16)
    assert not torch.equal(before, after), "the case must tell the two orders apart"
    assert torch.equal(norm(x, Batch.of([200])), before)


def test_a_tied_head_is_the_embedding():
    model = shaken_model(SMALL.replace(tie_embeddings=True))
    assert model.decoder.head is None
    assert "head.weight" not in dict(model.decoder.named_parameters())
    hidden = torch.randn(3, SMALL.d_model)
    expected = hidden @ model.decoder.embedding.weight.T
    torch.testing.assert_close(model.decoder.logits(hidden), expected)


def test_the_forward_pass_never_touches_a_parameter():
    model = shaken_model(SMALL)
    before = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
    versions = {name: p._version for name, p in model.decoder.named_parameters()}
    model.logits([random_ids(SMALL, 20)], [model.new_state()])
    for name, parameter in model.decoder.named_parameters():
        assert parameter._version == versions[name], name
        assert torch.equal(parameter, before[name]), name
