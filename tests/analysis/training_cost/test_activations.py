"""What a pass keeps for its backward pass, to the byte: held against torch's own hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jamba_lm.analysis.training_cost import activations
from jamba_lm.analysis.training_cost.activations import pass_activations, scan_state_bytes
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.config import JambaConfig
from jamba_lm.kernels import native_scan
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.parallel_layout import ParallelLayout
from jamba_lm.training import loss
from jamba_lm.training.output import output_weight
from jamba_lm.training.recompute import recompute_layers

BASE = JambaConfig(
    vocab_size=256,
    d_model=48,
    d_ff=80,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    dt_rank=5,
    attention_period=4,
    attention_offset=2,
)
ARMS = {
    "hybrid": BASE,
    "no inner norms": BASE.replace(inner_norms=False),
    "dense": BASE.replace(num_experts=1),
    "tied, odd sizes": BASE.replace(tie_embeddings=True, state_size=5, expand=3),
}
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def saved(
    config: JambaConfig, work: Pass, recompute: bool = False
) -> tuple[int, list[list[int]], int]:
    """Return the bytes that autograd keeps of a pass, the experts' loads, and those of the hidden.

    Memory counts once however many operations keep it, and weights do not count.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    initialize(decoder, 0)
    decoder.to(DTYPES[work.width])
    if recompute:
        recompute_layers(decoder)
    kept: dict[int, Any] = {}
    weights = {one.untyped_storage().data_ptr() for one in decoder.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (x, storage.nbytes())
        return x

    draw = torch.Generator().manual_seed(1)
    rows = work.sequences * work.tokens
    ids_M = torch.randint(0, config.vocab_size, (rows,), generator=draw)
    batch = Batch.of([work.tokens] * work.sequences, routing=[])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_MD = decoder(ids_M, batch, hidden=True)
        total = loss.summed_cross_entropy(hidden_MD, output_weight(decoder), ids_M)
    # Gradients that are made with the loss lie with its node, but not as saved tensors.
    for gradient in total.grad_fn.found:
        keep(gradient)
    # Where sequences start is no activation.
    kept.pop(batch.offsets.untyped_storage().data_ptr(), None)
    loads = [
        torch.bincount(one.expert_MK.flatten(), minlength=config.num_experts).tolist()
        for one in batch.routing or ()
    ]
    return sum(count for _, count in kept.values()), loads, hidden_MD.nbytes


@pytest.mark.parametrize("width", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 64), (2, 33)])
@pytest.mark.parametrize("arm", ARMS)
def test_activations_are_those_of_autograd_to_the_byte(
    arm: str, sizes: tuple[int, int], width: int
):
    work = Pass(sequences=sizes[0], tokens=sizes[1], width=width)
    counted, loads, hidden = saved(ARMS[arm], work)
    plan = pass_activations(Rank(ARMS[arm], ParallelLayout(), work), loads)
    assert counted == plan.layers + plan.ends - hidden
    assert plan.layers == sum(plan.by_part.values())


@pytest.mark.parametrize("width", DTYPES)
def test_the_gradient_of_a_head_that_sees_several_pieces_is_a_wide_sum(monkeypatch, width: int):
    monkeypatch.setattr(activations, "LOGIT_ROWS", 16)
    monkeypatch.setattr(loss, "CHUNK_ROWS", 16)
    work = Pass(sequences=1, tokens=17, width=width)
    counted, loads, hidden = saved(BASE, work)
    plan = pass_activations(Rank(BASE, ParallelLayout(), work), loads)
    assert counted == plan.layers + plan.ends - hidden


def test_layers_that_are_computed_again_keep_their_input_only():
    work = Pass(sequences=2, tokens=40, width=4, recompute=True)
    counted, _, hidden = saved(BASE, work, recompute=True)
    plan = pass_activations(Rank(BASE, ParallelLayout(), work))
    # The first layer's input is the embedding's result and the last one's output the norm's input.
    assert counted == plan.layers + plan.ends - hidden
    assert plan.by_part == {"layer inputs": plan.layers}
    assert plan.again > 0


def test_the_sizes_of_checkpoints_and_pieces_are_those_of_the_kernels():
    assert activations.SCAN_CHECKPOINT_TOKENS == native_scan._CHECKPOINT_TOKENS
    assert activations.SCAN_CHANNELS == native_scan._CHECKPOINT_CHANNELS
    assert activations.SCAN_STATES == native_scan._CHECKPOINT_STATES
    assert activations.LOGIT_ROWS == loss.CHUNK_ROWS
    assert activations.WEIGHT_ROWS == loss.WEIGHT_ROWS
    rank = Rank(BASE, ParallelLayout(), Pass(sequences=2, tokens=17))
    assert scan_state_bytes(rank) == 4 * native_scan._checkpoint_floats(
        torch.tensor([0, 17, 34]), BASE.d_inner, BASE.state_size
    )


@pytest.mark.parametrize("axis", ["context", "tensor", "sequence", "expert"])
def test_a_mesh_keeps_less_on_each_rank(axis: str):
    meshes = {
        "context": ParallelLayout(context=2),
        "tensor": ParallelLayout(tensor=2),
        "sequence": ParallelLayout(tensor=2, sequence=True),
        "expert": ParallelLayout(shard=2, expert=2),
    }
    work = Pass(sequences=1, tokens=64, width=4)

    def total(mesh: ParallelLayout) -> int:
        return pass_activations(Rank(BASE, mesh, work)).layers

    if axis == "expert":
        # Experts elsewhere do not change how many rows a rank computes, only whose they are.
        assert total(meshes[axis]) == total(ParallelLayout())
    else:
        assert total(meshes[axis]) < total(ParallelLayout())
    assert total(meshes["sequence"]) < total(meshes["tensor"])
