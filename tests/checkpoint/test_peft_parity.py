"""Adapters of peft 0.21 over transformers' Jamba against ours: one reads what the other wrote."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import jamba_lm
from jamba_lm.checkpoint.adapter import Adapter, LowRank
from jamba_lm.checkpoint.adapter_reader import read_adapter
from jamba_lm.checkpoint.adapter_writer import write_adapter
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError
from jamba_lm.finetuning.linears import chosen_places
from jamba_lm.model.decoder import Decoder
from tests.checkpoint.oracle import PLAIN, config_values, some_ids, their_model
from tests.tolerances import ORACLE, assert_within

VALUES = config_values(
    PLAIN | {"num_hidden_layers": 4, "attention period, offset": (4, 2), "num_experts": 4}
)
IDS = some_ids(19)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "x_proj", "out_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
EVERYTHING = ["attention", "mamba", "mlp", "experts", "router", "embedding", "head"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "base"
    their_model(VALUES, seed=3).save_pretrained(folder)
    return folder


def their_logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0].float()


def our_logits(base: Path, adapter: Path | None) -> Tensor:
    (logits,) = jamba_lm.load(base, adapter=adapter).logits([IDS])
    return logits


def peft_writes(folder: Path, settings: LoraConfig) -> Tensor:
    """Let peft draw an adapter over the model of seed 3 and save it; return its logits."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        # It says that patterns for parameters are ignored, and then follows them.
        warnings.simplefilter("ignore")
        model = get_peft_model(their_model(VALUES, seed=3), settings)
        model.eval()
        model.save_pretrained(folder)
    return their_logits(model)


def peft_reads(folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(their_model(VALUES, seed=3), folder)
    model.eval()
    return model


def drawn_adapter(config: JambaConfig, targets: list[str], *, rank: int, scale: float) -> Adapter:
    with torch.device("meta"):
        decoder = Decoder(config)
    draw = torch.Generator().manual_seed(5)
    changes = {
        f"{place.path}.weight": LowRank(
            torch.randn(rank, place.inputs, generator=draw) / place.inputs**0.5,
            torch.randn(place.outputs, rank, generator=draw) / rank**0.5,
            scale,
        )
        for place in chosen_places(decoder, targets)
    }
    return Adapter(changes)


SETTINGS = {
    "modules": {"target_modules": [*MODULES, *DENSE], "r": 3, "lora_alpha": 5},
    "stacked experts": {
        "target_modules": MODULES,
        "target_parameters": EXPERTS,
        "r": 2,
        "lora_alpha": 4,
    },
    "gate and up alone": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1], "r": 4},
    "down alone, and routers": {
        "target_modules": ["q_proj"],
        "target_parameters": [EXPERTS[1], "router.weight"],
        "r": 4,
    },
    "patterns": {
        "target_modules": MODULES,
        "target_parameters": EXPERTS,
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {
            "q_proj": 5,
            "experts.gate_up_proj": 3,
            r"^model\.layers\.1\..*out_proj": 1,
        },
        "alpha_pattern": {"q_proj": 1, "experts.gate_up_proj": 9},
    },
    "rslora": {"target_modules": [*MODULES, *DENSE], "r": 5, "lora_alpha": 3, "use_rslora": True},
    # What AI21's card of Jamba v0.1 fine-tunes.
    "embedding and mixers": {
        "target_modules": ["embed_tokens", "x_proj", "in_proj", "out_proj"],
        "r": 8,
    },
    "saved whole": {
        "target_modules": MODULES,
        "modules_to_save": ["lm_head", "final_layernorm", "conv1d"],
        "r": 2,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_that_peft_wrote_gives_the_same_logits(base, tmp_path, settings):
    folder = tmp_path / "adapter"
    theirs = peft_writes(folder, LoraConfig(**settings, init_lora_weights=False))
    assert_within(our_logits(base, folder), theirs, ORACLE["fp32"])
    plain = our_logits(base, None)
    assert float((plain - theirs).abs().max()) > 0.1, "the adapter changes nothing to speak of"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets",
    [
        EVERYTHING,
        ["attention", "experts.gate_proj"],
        ["experts.up_proj"],
        ["mlp", "experts.down_proj"],
        ["in_proj", "router"],
        ["embedding"],
        ["head", "q_proj"],
    ],
    ids=" ".join,
)
def test_an_adapter_that_we_wrote_gives_the_same_logits_in_peft(base, tmp_path, targets, rslora):
    config = JambaConfig.load(base)
    scale = 6.0 / 3**0.5 if rslora else 2.0
    # transformers reads dt_proj's matrix past its module, so that peft's wrapper has no say there.
    wanted = [one for one in targets if one != "mamba"]
    if "mamba" in targets:
        wanted += ["in_proj", "x_proj", "out_proj"]
    adapter = drawn_adapter(config, wanted, rank=3, scale=scale)
    write_adapter(tmp_path, adapter, config, alpha=6.0, rslora=rslora)
    assert_within(our_logits(base, tmp_path), their_logits(peft_reads(tmp_path)), ORACLE["fp32"])


def test_peft_applies_an_adapter_of_dt_proj_when_it_merges(base, tmp_path):
    config = JambaConfig.load(base)
    adapter = drawn_adapter(config, ["dt_proj"], rank=2, scale=3.0)
    write_adapter(tmp_path, adapter, config, alpha=6.0)
    ours = our_logits(base, tmp_path)
    model = peft_reads(tmp_path)
    # Beside the model it is dead in transformers: this is what docs/finetuning.md warns of.
    assert_within(their_logits(model), our_logits(base, None), ORACLE["fp32"])
    assert_within(ours, their_logits(model.merge_and_unload()), ORACLE["fp32"])


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read_again(base, tmp_path, rslora):
    config = JambaConfig.load(base)
    adapter = drawn_adapter(config, EVERYTHING, rank=3, scale=6.0 / 3**0.5 if rslora else 2.0)
    write_adapter(tmp_path, adapter, config, alpha=6.0, rslora=rslora)
    found = read_adapter(tmp_path, config)
    assert found.changes.keys() == adapter.changes.keys()
    for name, change in adapter.changes.items():
        # Gate and up come back with the rank of both and zeros in between, which changes no sum.
        torch.testing.assert_close(found.changes[name].delta(), change.delta())


def test_a_change_of_the_embedding_is_added_to_the_one_that_peft_saved_with_it(base, tmp_path):
    """It need not be the model's: peft saves it for vocabularies that have grown."""
    folder = tmp_path / "adapter"
    peft_writes(folder, LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    saved = load_file(folder / "adapter_model.safetensors")[name]
    change_tensors(folder, lambda t: t.update({name: t[name] + 1.0}))
    adapter = read_adapter(folder, JambaConfig.load(base))
    expected = saved + 1.0 + adapter.changes["embedding.weight"].delta()
    torch.testing.assert_close(adapter.merged("embedding.weight", saved), expected)


def test_adapters_of_single_experts_are_read(base, tmp_path):
    """Before transformers 5 every expert had modules of its own, and adapters have their names."""
    config = JambaConfig.load(base)
    adapter = drawn_adapter(config, ["experts"], rank=3, scale=2.0)
    tensors = {}
    for own, change in adapter.changes.items():
        name = "base_model.model." + own.replace("blocks.", "model.layers.")
        tensors[name.replace(".weight", ".lora_A.weight")] = change.down_RI
        tensors[name.replace(".weight", ".lora_B.weight")] = change.up_OR
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": DENSE}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    found = read_adapter(tmp_path, config)
    for own, change in adapter.changes.items():
        assert torch.equal(found.changes[own].delta(), change.delta())


@pytest.fixture
def written(base, tmp_path) -> Path:
    config = JambaConfig.load(base)
    adapter = drawn_adapter(config, ["attention", "experts"], rank=3, scale=2.0)
    write_adapter(tmp_path, adapter, config, alpha=6.0)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file({name: one.clone() for name, one in tensors.items()}, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "only LORA adapters are supported"),
        ({"use_dora": True}, "DoRA adapters are not supported"),
        ({"init_lora_weights": "pissa"}, "changes the model's own weights"),
        ({"bias": "all"}, "trained biases are not supported"),
        ({"lora_bias": True}, "'lora_bias' True, which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_new_trick": 3}, "some_new_trick"),
        ({"r": 4}, r"has rank 3 .* says 4"),
        ({"r": 0}, "expected a whole number above 0"),
        ({"lora_alpha": "much"}, "expected a number above 0"),
        ({"rank_pattern": {"(a+)+": 3}}, "expected the name of a module"),
        ({"rank_pattern": {"(q_proj": 3}}, "which is no pattern"),
        ({"target_parameters": "experts"}, "expected a list of names"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(base, written, changes, said):
    change_config(written, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_adapter(written, JambaConfig.load(base))
    assert "\n" not in str(caught.value)


A = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
STACK = "base_model.model.model.layers.1.feed_forward.experts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(A), "has no lora_A for"),
        (lambda t: t.pop(B), "has no lora_B for"),
        (lambda t: t.update({A: t[A][:, :-1]}), "it is for another model"),
        (lambda t: t.update({A: t[A].flatten()}), "expected matrices"),
        (lambda t: t.update({A: t[A].long()}), "expected floats"),
        (lambda t: t.update({A.replace("layers.2", "layers.9"): t[A], B.replace("layers.2", "layers.9"): t[B]}), "does not have"),  # noqa: E501
        (lambda t: t.update({"q_proj.lora_A.weight": t[A]}), "expected names that begin with"),
        (lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[A]}), "no part of plain LoRA"),  # noqa: E501
        (lambda t: t.update({f"{STACK}.lora_A.weight": t[f"{STACK}.lora_A.weight"][:-1]}), "a multiple of the model's 4 experts"),  # noqa: E501
        (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "replaces lm_head.weight by one of shape"),  # noqa: E501
        (lambda t: t.update({f"base_model.model.lm_head{x}.weight": t[A] for x in ("", ".base_layer")}), "holds lm_head twice"),  # noqa: E501
        (lambda t: t.clear(), "holds no tensor"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(base, written, change, said):
    change_tensors(written, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_adapter(written, JambaConfig.load(base))
    assert "\n" not in str(caught.value)


def test_a_stack_whose_parameter_is_not_said_is_refused(base, written):
    change_tensors(written, lambda t: [t.pop(name) for name in list(t) if "base_layer" in name])
    change_config(written, target_parameters=None)
    with pytest.raises(CheckpointError, match="do not say for which parameter"):
        read_adapter(written, JambaConfig.load(base))


def test_a_pickle_and_an_empty_folder_are_refused(base, tmp_path):
    config = JambaConfig.load(base)
    with pytest.raises(CheckpointError, match="no adapter at"):
        read_adapter(tmp_path / "none", config)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_adapter(tmp_path, config)


def test_a_head_that_is_the_embedding_takes_no_change_of_its_own(tmp_path):
    values = VALUES | {"tie_word_embeddings": True}
    folder = tmp_path / "base"
    their_model(values, seed=3).save_pretrained(folder)
    config = JambaConfig.load(folder)
    assert config.tie_embeddings
    adapter = drawn_adapter(config, ["attention"], rank=3, scale=2.0)
    write_adapter(tmp_path, adapter, config, alpha=6.0)
    rank3 = torch.zeros(3, config.d_model), torch.zeros(config.vocab_size, 3)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    change_tensors(tmp_path, lambda t: t.update(zip(names, rank3, strict=True)))
    with pytest.raises(CheckpointError, match="one matrix for both embedding and head"):
        read_adapter(tmp_path, config)
