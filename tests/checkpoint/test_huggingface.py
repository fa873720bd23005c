"""Folders are read whole, or refused with what to do; and written so that they can be read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, JambaForCausalLM

from jamba_lm.checkpoint.huggingface import read_decoder, write_decoder
from jamba_lm.errors import CapacityError, CheckpointError, InputError
from jamba_lm.model.decoder import Decoder
from tests.arms import ARMS, SMALL, shaken_model
from tests.checkpoint.folders import (
    INDEX,
    TINY,
    WEIGHTS,
    checkpoint,
    edit_config,
    edit_json,
    rewrite,
    same_weights,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_arm_is_read_as_it_was_written(tmp_path: Path, arm: str, dtype: str):
    decoder = shaken_model(ARMS[arm], dtype=dtype).decoder
    write_decoder(tmp_path / "x", ARMS[arm], decoder)
    config, again = read_decoder(tmp_path / "x")
    assert config == ARMS[arm]
    assert same_weights(again, decoder)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_any_stored_type_is_read_as_any_other(tmp_path: Path, stored: str, wanted: str):
    checkpoint(tmp_path, dtype=stored)
    _, decoder = read_decoder(tmp_path, wanted)
    file = load_file(tmp_path / WEIGHTS)
    embedding = file["model.embed_tokens.weight"]
    assert embedding.dtype == DTYPES[stored]
    assert torch.equal(decoder.embedding.weight, embedding.to(DTYPES[wanted]))


def test_auto_takes_the_type_most_values_have(tmp_path: Path):
    checkpoint(tmp_path, dtype="bf16")
    rewrite(
        tmp_path,
        lambda w: {n: t.float() if "norm" in n or "router" in n else t for n, t in w.items()},
    )
    _, decoder = read_decoder(tmp_path)
    assert decoder.final_norm.weight.dtype == decoder.embedding.weight.dtype == torch.bfloat16


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path):
    one = checkpoint(tmp_path / "one")
    many = checkpoint(tmp_path / "many", shard_bytes=3000)
    names = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert max((many / name).stat().st_size for name in names) < 3000 + 2000  # weights + header
    assert same_weights(read_decoder(one)[1], read_decoder(many)[1])
    total = sum(t.numel() * t.element_size() for t in load_file(one / WEIGHTS).values())
    index = json.loads((many / INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    assert sorted(index["weight_map"]) == sorted(load_file(one / WEIGHTS))
    JambaForCausalLM.from_pretrained(many)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say RssAnon")


def test_reading_the_stored_type_copies_nothing(tmp_path: Path):
    config = SMALL.replace(vocab_size=2**15, d_model=256, d_ff=1024)
    size = write_decoder(
        tmp_path / "x", config, shaken_model(config, dtype="bf16").decoder, dtype="bf16"
    )
    assert size > 40e6
    before = anonymous_bytes()
    _, decoder = read_decoder(tmp_path / "x")
    total = sum(float(p.detach().view(-1)[0]) for p in decoder.parameters())
    assert torch.isfinite(torch.tensor(total))
    assert anonymous_bytes() - before < size / 8


def test_changing_weights_in_place_does_not_change_the_file(tmp_path: Path):
    checkpoint(tmp_path)
    _, decoder = read_decoder(tmp_path)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert read_decoder(tmp_path)[1].embedding.weight.any()


def test_stacked_experts_are_taken_apart(tmp_path: Path):
    checkpoint(tmp_path)
    _, expected = read_decoder(tmp_path, "fp32")
    expected_bits = {name: p.detach().clone() for name, p in expected.named_parameters()}

    def stack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: t for name, t in weights.items() if ".experts." not in name}
        for layer in (1, 3):
            prefix = f"model.layers.{layer}.feed_forward.experts"

            def part(kind: str, prefix: str = prefix) -> Tensor:
                return torch.stack([weights[f"{prefix}.{e}.{kind}.weight"] for e in range(4)])

            kept[f"{prefix}.gate_up_proj"] = torch.cat([part("gate_proj"), part("up_proj")], 1)
            kept[f"{prefix}.down_proj"] = part("down_proj")
        return kept

    rewrite(tmp_path, stack)
    _, found = read_decoder(tmp_path)
    assert dict.fromkeys(expected_bits, True) == {
        name: torch.equal(p, expected_bits[name]) for name, p in found.named_parameters()
    }


def old_name(name: str) -> str:
    layer = name.split(".")[2] if "layers" in name else ""
    if ".feed_forward." in name and layer in ("0", "2"):
        name = name.replace(".feed_forward.", ".feed_forward.experts.0.")
    name = name.replace(".feed_forward.", ".moe.").replace("pre_ff_", "pre_moe_")
    return name.replace(".b_layernorm", ".B_layernorm").replace(".c_layernorm", ".C_layernorm")


def test_pre_release_names_are_read(tmp_path: Path):
    checkpoint(tmp_path)
    expected = {n: p.detach().clone() for n, p in read_decoder(tmp_path)[1].named_parameters()}
    rewrite(tmp_path, lambda weights: {old_name(n): t for n, t in weights.items()})
    names = set(load_file(tmp_path / WEIGHTS))
    assert "model.layers.0.moe.experts.0.up_proj.weight" in names
    assert "model.layers.0.mamba.B_layernorm.weight" in names
    assert "model.layers.1.pre_moe_layernorm.weight" in names
    _, found = read_decoder(tmp_path)
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())


# One error, which says what is missing, left over or misshapen, and which field is likely wrong.

WRONG_FIELDS = {
    "intermediate_size": (7, "intermediate_size is 7 in config.json, the tensors say 12"),
    "vocab_size": (24, "vocab_size is 24 in config.json, the tensors say 23"),
    "hidden_size": (16, "hidden_size is 16 in config.json, the tensors say 8"),
    "mamba_d_state": (5, "mamba_d_state is 5 in config.json, the tensors say 4"),
    "mamba_d_conv": (3, "mamba_d_conv is 3 in config.json, the tensors say 4"),
    "mamba_dt_rank": (2, "mamba_dt_rank is 2 in config.json, the tensors say 3"),
    "mamba_expand": (4, "mamba_expand is 4 in config.json, the tensors say 2"),
    "mamba_conv_bias": (False, "mamba_conv_bias is false in config.json, the tensors say true"),
    "mamba_proj_bias": (True, "mamba_proj_bias is true in config.json, the tensors say false"),
    "num_hidden_layers": (5, "num_hidden_layers is 5 in config.json, the tensors say 4"),
    "num_experts": (8, "num_experts is 8 in config.json, the tensors say 4"),
    "num_experts ": (1, "num_experts is 1 in config.json, the tensors say 4"),
    "head_dim": (6, "num_attention_heads x head_dim is 12 in config.json, the tensors say 8"),
    "num_key_value_heads": (
        2,
        "num_key_value_heads x head_dim is 8 in config.json, the tensors say 4",
    ),
    "attn_layer_offset": (
        3,
        "layer 2 is a Mamba layer in config.json (attn_layer_period 4, attn_layer_offset 3) but "
        "holds self_attn.* tensors; attn_layer_period 4 with attn_layer_offset 2 would fit",
    ),
    "attn_layer_offset ": (
        0,
        "layer 0 is an attention layer in config.json (attn_layer_period 4, attn_layer_offset 0) "
        "but holds mamba.* tensors; attn_layer_period 4 with attn_layer_offset 2 would fit",
    ),
    "expert_layer_offset": (
        0,
        "layer 0 has experts in config.json (expert_layer_period 2, expert_layer_offset 0) but the "
        "tensors have no router there; expert_layer_period 2 with expert_layer_offset 1 would fit",
    ),
    "tie_word_embeddings": (True, "lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("key", WRONG_FIELDS)
def test_the_field_that_is_wrong_is_named(tmp_path: Path, key: str):
    value, clue = WRONG_FIELDS[key]
    checkpoint(tmp_path)
    edit_config(tmp_path, **{key.strip(): value})
    with pytest.raises(CheckpointError) as refused:
        read_decoder(tmp_path)
    message = str(refused.value)
    assert clue in message
    assert "\n" not in message
    assert len(message) < 1500


def test_a_tied_config_of_an_untied_file_is_told_so(tmp_path: Path):
    checkpoint(tmp_path, TINY.replace(tie_embeddings=True))
    edit_config(tmp_path, tie_word_embeddings=False)
    clue = "tie_word_embeddings is false in config.json, the tensors say true; 1 missing: lm_head"
    with pytest.raises(CheckpointError, match=clue):
        read_decoder(tmp_path)


def test_one_error_lists_all_that_differs(tmp_path: Path):
    checkpoint(tmp_path)

    def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        del weights["model.layers.0.mamba.D"]
        del weights["model.final_layernorm.weight"]
        weights["model.layers.0.mamba.Z"] = torch.zeros(3)
        weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(8, 9)
        return weights

    rewrite(tmp_path, spoil)
    with pytest.raises(CheckpointError) as refused:
        read_decoder(tmp_path)
    message = str(refused.value)
    assert "2 missing: model.layers.0.mamba.D, model.final_layernorm.weight" in message
    assert "1 left over: model.layers.0.mamba.Z" in message
    assert "model.layers.2.self_attn.q_proj.weight is [8, 9], needed [8, 8]" in message


def test_one_odd_tensor_is_not_blamed_on_the_config(tmp_path: Path):
    checkpoint(tmp_path)
    key = "model.layers.0.mamba.A_log"
    rewrite(tmp_path, lambda weights: weights | {key: torch.zeros(16, 9)})
    with pytest.raises(CheckpointError) as refused:
        read_decoder(tmp_path)
    assert "likely wrong" not in str(refused.value)
    assert f"{key} is [16, 9], needed [16, 4]" in str(refused.value)


def test_a_weight_given_under_two_names_is_refused(tmp_path: Path):
    checkpoint(tmp_path)
    key = "model.layers.0.mamba.b_layernorm.weight"
    old = key.replace("b_l", "B_l")
    rewrite(tmp_path, lambda weights: weights | {old: weights[key].clone()})
    with pytest.raises(CheckpointError, match="1 given more than once") as refused:
        read_decoder(tmp_path)
    assert old in str(refused.value)


def test_a_file_of_the_bare_model_is_recognised(tmp_path: Path):
    checkpoint(tmp_path)
    rewrite(
        tmp_path,
        lambda w: {n.removeprefix("model."): t for n, t in w.items() if n.startswith("model.")},
    )
    with pytest.raises(CheckpointError, match="was the bare JambaModel saved"):
        read_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8])
def test_other_types_than_three_are_refused(tmp_path: Path, dtype: torch.dtype):
    checkpoint(tmp_path)
    key = "model.layers.1.feed_forward.router.weight"
    rewrite(tmp_path, lambda weights: weights | {key: weights[key].to(dtype)})
    with pytest.raises(
        CheckpointError, match=r"router.weight is torch.*read from fp32, bf16, fp16"
    ):
        read_decoder(tmp_path)


def test_pickle_files_are_refused_with_the_reason(tmp_path: Path):
    checkpoint(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin are pickle files.*run any code"):
        read_decoder(tmp_path)


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"expected a folder with config.json"):
        read_decoder(tmp_path / "nowhere")


def test_an_unknown_type_is_refused(tmp_path: Path):
    checkpoint(tmp_path)
    with pytest.raises(InputError, match="unknown dtype 'int4': expected one of fp32, bf16, fp16"):
        read_decoder(tmp_path, "int4")


# Writing


def test_what_transformers_cannot_compute_it_refuses(tmp_path: Path):
    write_decoder(
        tmp_path / "x", ARMS["hybrid, rotary"], shaken_model(ARMS["hybrid, rotary"]).decoder
    )
    with pytest.raises(ValueError, match="jamba_lm"):
        AutoConfig.from_pretrained(tmp_path / "x")


def test_stop_ids_are_in_generation_config(tmp_path: Path):
    checkpoint(tmp_path, TINY.replace(eos_ids=(2, 5), bos_id=None))
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values == {"_from_model_config": True, "eos_token_id": [2, 5], "pad_token_id": 0}
    theirs = JambaForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [2, 5]


def test_weights_of_another_config_are_not_written(tmp_path: Path):
    decoder = shaken_model(SMALL).decoder
    with pytest.raises(CheckpointError, match="not those of the config: 17 missing"):
        write_decoder(tmp_path / "x", SMALL.replace(num_layers=5), decoder)
    with pytest.raises(CheckpointError, match="has shape"):
        write_decoder(tmp_path / "x", SMALL.replace(d_ff=40), decoder)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_values_are_not_written(tmp_path: Path):
    with torch.device("meta"):
        blank = Decoder(TINY)
    with pytest.raises(CheckpointError, match="on meta: expected values"):
        write_decoder(tmp_path / "x", TINY, blank)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_overwritten_only_when_asked(tmp_path: Path):
    checkpoint(tmp_path / "x", shard_bytes=3000)
    (tmp_path / "x" / "tokenizer.json").write_text("kept")
    decoder = shaken_model(TINY, seed=5).decoder
    with pytest.raises(InputError, match="already holds a checkpoint"):
        write_decoder(tmp_path / "x", TINY, decoder)
    write_decoder(tmp_path / "x", TINY, decoder, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert same_weights(read_decoder(tmp_path / "x")[1], decoder)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_model_may_be_written_over_the_files_it_is_mapped_from(tmp_path: Path):
    checkpoint(tmp_path / "x")
    config, decoder = read_decoder(tmp_path / "x")
    expected = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    write_decoder(tmp_path / "x", config, decoder, overwrite=True)
    _, again = read_decoder(tmp_path / "x")
    assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(CapacityError, match="has 100 free"):
        checkpoint(tmp_path / "x")


def test_a_shard_size_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="shard_bytes is 0"):
        checkpoint(tmp_path / "x", shard_bytes=0)


# Index files


def test_both_layouts_at_once_are_refused(tmp_path: Path):
    checkpoint(tmp_path, shard_bytes=3000)
    first = next(tmp_path.glob("model-00001-*"))
    (tmp_path / WEIGHTS).write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="holds both"):
        read_decoder(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "../{0}",
        "/tmp/{0}",
        "sub/{0}",
        "..",
        "",
        ".hidden.safetensors",
        "sub\\{0}",
        7,
        None,
        ["{0}"],
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, place: object):
    folder = checkpoint(tmp_path / "x", shard_bytes=3000)
    name = next(folder.glob("model-00001-*")).name
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    spelt = place.format(name) if isinstance(place, str) else place

    def lead_out(index: dict) -> dict:
        places = index["weight_map"].items()
        moved = {key: spelt if file == name else file for key, file in places}
        return index | {"weight_map": moved}

    edit_json(folder / INDEX, lead_out)
    with pytest.raises(CheckpointError, match=r"expected the plain name of a .safetensors file"):
        read_decoder(folder)


def test_shards_that_are_symbolic_links_are_followed(tmp_path: Path):
    # The cache of the Hugging Face hub is made of them.
    folder = checkpoint(tmp_path / "x", shard_bytes=3000)
    expected = {n: p.detach().clone() for n, p in read_decoder(folder)[1].named_parameters()}
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    _, decoder = read_decoder(folder)
    assert all(torch.equal(p, expected[name]) for name, p in decoder.named_parameters())


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = checkpoint(tmp_path, shard_bytes=3000)
    gone = next(folder.glob("model-00002-*"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"are not there: {gone.name}; is the download"):
        read_decoder(folder)


def test_swapped_shards_are_noticed(tmp_path: Path):
    folder = checkpoint(tmp_path, shard_bytes=3000)
    first, second = sorted(folder.glob("model-0000[12]-*"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"disagrees with model.safetensors.index.json: it lacks"
    ):
        read_decoder(folder)


def test_a_tensor_the_index_does_not_list_is_noticed(tmp_path: Path):
    folder = checkpoint(tmp_path, shard_bytes=3000)

    def forget(index: dict) -> dict:
        del index["weight_map"]["model.layers.0.mamba.D"]
        return index

    edit_json(folder / INDEX, forget)
    with pytest.raises(CheckpointError, match=r"it also holds model.layers.0.mamba.D"):
        read_decoder(folder)


def test_a_config_that_claims_far_too_much_builds_nothing(tmp_path: Path):
    folder = checkpoint(tmp_path)
    edit_config(folder, num_hidden_layers=9999, num_experts=60000)
    with pytest.raises(CheckpointError, match=r"far too few for its config.json"):
        read_decoder(folder)
