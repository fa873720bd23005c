"""Quantised folders: written whole, read in place, refused when anything about them is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, JambaForCausalLM

from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.checkpoint.packed_writer import quantize_folder
from jamba_lm.checkpoint.random_init import write_random_checkpoint
from jamba_lm.checkpoint.shards import WeightFiles
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CheckpointError, ConfigError, InputError, JambaError
from jamba_lm.language_model import load
from jamba_lm.quantization.policy import all_schemes, find_scheme
from jamba_lm.quantization.rewrite import stored_tensors
from tests.arms import ARMS, SMALL, random_ids
from tests.checkpoint.folders import (
    INDEX,
    TINY,
    WEIGHTS,
    checkpoint,
    edit_config,
    edit_json,
    rewrite,
)
from tests.cli.running import ENVIRONMENT
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401 - a fixture

LABELS = [scheme.label for scheme in all_schemes()]
EVERY_SCHEME = pytest.mark.parametrize("label", LABELS)


def packed_folder(
    folder: Path, label: str = "int4", config: JambaConfig = SMALL, dtype: str = "bf16"
) -> Path:
    checkpoint(folder / "plain", config, dtype=dtype)
    quantize_folder(folder / "plain", folder / "packed", find_scheme(label))
    return folder / "packed"


@EVERY_SCHEME
@pytest.mark.parametrize("arm", ARMS)
def test_a_folder_holds_what_packing_at_load_gives(arm, label, tmp_path):
    folder = packed_folder(tmp_path, label, ARMS[arm])
    stored, packed = load(folder), load(tmp_path / "plain", quantize=label)
    assert stored.fingerprint == packed.fingerprint
    assert stored.config == packed.config == ARMS[arm]
    ids = random_ids(SMALL, 20)
    assert torch.equal(stored.logits([ids])[0], packed.logits([ids])[0])


@EVERY_SCHEME
@pytest.mark.parametrize("arm", ARMS)
def test_the_file_is_as_large_as_planned(arm, label, tmp_path):
    folder = packed_folder(tmp_path, label, ARMS[arm])
    stored = load_file(folder / WEIGHTS)
    assert sum(tensor.nbytes for tensor in stored.values()) == weight_bytes(ARMS[arm], label)


@EVERY_SCHEME
def test_tensors_are_aligned_and_stay_in_the_map(label, tmp_path):
    folder = packed_folder(tmp_path, label, ARMS["odd sizes"])
    model = load(folder)
    tensors = dict(stored_tensors(model.decoder))
    for name, tensor in tensors.items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name
    # A map is one stretch of addresses, as long as the file.
    first = min(tensor.data_ptr() for tensor in tensors.values())
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors.values())
    assert last - first <= (folder / WEIGHTS).stat().st_size


LOADING = """
import resource, sys
import jamba_lm.language_model as language_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
language_model.load(sys.argv[1]).logits([[1, 2, 3]])
before = peak()
model = language_model.load(sys.argv[2])
loaded = peak()
model.logits([[1, 2, 3]])
print(loaded - before, peak() - before)
"""


@EVERY_SCHEME
def test_loading_takes_no_more_than_the_file(label, tmp_path):
    wide = SMALL.replace(d_model=256, d_ff=256, dt_rank=None, vocab_size=49_152)
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    folder = packed_folder(large, label, wide)
    run = subprocess.run(
        [sys.executable, "-c", LOADING, packed_folder(small, label), folder],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    loaded, used = map(int, run.stdout.split())
    size = (folder / WEIGHTS).stat().st_size
    assert size > 20 * 2**20
    # Scales are checked and vectors looked at; nothing else is read before it is used.
    assert loaded < 0.35 * size + 4 * 2**20
    assert used < size + 24 * 2**20


QUANTIZING = """
import resource, sys
import jamba_lm.checkpoint.packed_reader as packed_reader
import jamba_lm.checkpoint.packed_writer as packed_writer
from jamba_lm.quantization.policy import find_scheme
packed_reader.READ_BETWEEN_MAPS = 2**23
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
scheme = find_scheme(sys.argv[1])
packed_writer.quantize_folder(sys.argv[2], sys.argv[3] + "-small", scheme)
before = peak()
packed_writer.quantize_folder(sys.argv[4], sys.argv[3], scheme)
print(peak() - before)
"""


def test_packing_a_folder_never_holds_the_model(tmp_path):
    deep = SMALL.replace(d_model=256, d_ff=1024, num_layers=16, dt_rank=None, vocab_size=512)
    small = checkpoint(tmp_path / "small", dtype="bf16")
    source = checkpoint(tmp_path / "plain", deep, dtype="bf16")
    size = (source / WEIGHTS).stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", QUANTIZING, "int8", small, tmp_path / "packed", source],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert size > 70 * 2**20
    assert int(run.stdout) < 0.5 * size


def test_a_folder_may_be_cut_into_shards(tmp_path):
    source = checkpoint(tmp_path / "plain", SMALL, dtype="bf16", shard_bytes=40_000)
    packed = tmp_path / "packed"
    quantize_folder(source, packed, find_scheme("int4"), shard_bytes=20_000)
    assert (packed / INDEX).exists()
    assert len(list(packed.glob("*.safetensors"))) > 2
    one_file = packed_folder(tmp_path / "one")
    assert load(packed).fingerprint == load(one_file).fingerprint


def test_what_belongs_to_the_model_comes_along(tmp_path, tiny_checkpoint):  # noqa: F811
    source = Path(tiny_checkpoint)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.3}')
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    packed = tmp_path / "packed"
    quantize_folder(source, packed, find_scheme("int8"))
    names = {path.name for path in packed.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json", WEIGHTS} <= names
    assert "pytorch_model.bin" not in names
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (packed / name).read_bytes() == (source / name).read_bytes()


def test_transformers_refuses_the_folder(tmp_path):
    folder = packed_folder(tmp_path, "int8")
    with pytest.raises((ValueError, KeyError), match="jamba_lm"):
        AutoConfig.from_pretrained(folder)
    with pytest.raises((ValueError, KeyError), match="jamba_lm"):
        AutoModelForCausalLM.from_pretrained(folder)
    # Also when the caller names the class, which skips the look at the model's type.
    with pytest.raises(Exception, match=r"layers_block_type|layer_types|jamba_lm"):
        JambaForCausalLM.from_pretrained(folder)


def test_the_way_back_is_a_folder_that_transformers_reads(tmp_path):
    config = SMALL.replace(dt_rank=4)
    folder = packed_folder(tmp_path, "int8", config)
    model = load(folder)
    model.save(tmp_path / "plain again", dequantize=True)
    theirs = JambaForCausalLM.from_pretrained(
        tmp_path / "plain again", dtype=torch.float32, use_mamba_kernels=False
    )
    ids = random_ids(config, 12)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    found = load(tmp_path / "plain again", dtype="fp32").logits([ids])[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_config": None}, CheckpointError, "is torch.int8|is torch.uint8"),
        ({"model_type": "jamba"}, ConfigError, "model_type|architectures|quantization_config"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            CheckpointError,
            "cannot be honoured|has quantised",
        ),
    ],
)
def test_a_config_that_says_otherwise_is_refused(changes, error, message, tmp_path):
    folder = packed_folder(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(JambaError, match=message) as refused:
        load(folder)
    assert isinstance(refused.value, error)


def change_packing(folder: Path, **changes: object) -> None:
    edit_json(
        folder / "config.json",
        lambda values: values | {"quantization_config": values["quantization_config"] | changes},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 32}, "do not fit its config.json; .*wrong shape"),
        ({"scheme": "int9"}, "scheme is 'int9'"),
        ({"bits": 4}, "'bits' says nothing"),
        ({"group_size": 16}, "group_size is 16"),
    ],
)
def test_another_packing_than_the_file_s_is_refused(changes, message, tmp_path):
    folder = packed_folder(tmp_path, config=SMALL.replace(d_model=64, d_ff=64))
    change_packing(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


NAME = "model.layers.0.mamba.in_proj.weight"


def spoiled(change):
    return lambda weights: {**weights, **change(weights)}


def without(name: str):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_value(name: str, value: float):
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[name].view(-1)[1] = value
        return weights

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{NAME}.scale"), f"1 missing: {NAME}.scale"),
        (spoiled(lambda w: {f"{NAME}.zero": w[f"{NAME}.scale"].clone()}), "1 left over"),
        (spoiled(lambda w: {NAME: torch.zeros(128, 32)}), f"1 left over: {NAME}"),
        (
            spoiled(lambda w: {f"{NAME}.scale": w[f"{NAME}.scale"][:-1].clone()}),
            f"1 of the wrong shape: {NAME}.scale",
        ),
        (
            spoiled(lambda w: {f"{NAME}.scale": w[f"{NAME}.scale"].float()}),
            "is float32 of shape .*expected bfloat16",
        ),
        (
            spoiled(lambda w: {f"{NAME}.packed": w[f"{NAME}.packed"].to(torch.int8)}),
            "is int8 of shape .*expected uint8",
        ),
        (with_value(f"{NAME}.scale", float("nan")), "scale holds values from nan"),
        (with_value(f"{NAME}.scale", float("inf")), "to inf, expected finite"),
        (with_value(f"{NAME}.scale", -1.0), "not below 0"),
        (with_value(f"{NAME}.minimum", float("-inf")), "minimum holds values from -inf"),
        (
            spoiled(lambda w: {"model.final_layernorm.weight": torch.zeros(32, dtype=torch.int8)}),
            "final_layernorm.weight is int8, expected one of",
        ),
    ],
)
def test_damaged_weights_are_refused_by_name(change, message, tmp_path):
    folder = packed_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_eight_bit_scales_are_looked_at_too(tmp_path):
    folder = packed_folder(tmp_path, "int8")
    rewrite(folder, with_value("lm_head.weight.scale", float("nan")))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\.scale holds values from nan"):
        load(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 40_000), byte=st.integers(0, 255))
def test_any_byte_may_be_wrong(tmp_path, place, byte):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        checkpoint(folder / "plain", TINY, dtype="bf16")
        quantize_folder(folder / "plain", folder / "packed", find_scheme("int8"))
        (folder / "whole").write_bytes((folder / "packed" / WEIGHTS).read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    data[place % len(data)] = byte
    (folder / "packed" / WEIGHTS).write_bytes(data)
    try:
        load(folder / "packed").logits([[1, 2]])
    except JambaError as error:
        assert "\n" not in str(error)


def test_a_huge_claim_builds_no_modules(tmp_path):
    folder = packed_folder(tmp_path)
    edit_config(folder, num_hidden_layers=10_000, layers_block_type=None)
    with pytest.raises(JambaError, match="far too few"):
        load(folder)


@pytest.mark.parametrize("label", ["int8", "int4"])
def test_packed_weights_are_not_packed_again(label, tmp_path):
    folder = packed_folder(tmp_path, label)
    with pytest.raises(InputError, match=f"quantised already \\({label}\\)"):
        quantize_folder(folder, tmp_path / "again", find_scheme("int8"))
    with pytest.raises(InputError, match="quantised already"):
        load(folder, quantize="int8")
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_is_not_written_over_itself(tmp_path):
    folder = checkpoint(tmp_path / "plain", dtype="bf16")
    for target in (folder, tmp_path / "plain" / ".." / "plain"):
        with pytest.raises(InputError, match="is the checkpoint to quantise"):
            quantize_folder(folder, target, find_scheme("int8"), overwrite=True)
    assert load(folder).scheme is None


def test_a_failure_leaves_nothing_behind(tmp_path):
    folder = checkpoint(tmp_path / "plain", dtype="bf16")
    rewrite(folder, with_value("model.layers.1.mamba.out_proj.weight", float("nan")))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mixer\.out_proj\.weight holds NaN"):
        quantize_folder(folder, tmp_path / "packed", find_scheme("int8"))
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_a_quantised_folder_can_take_the_place_of_another(tmp_path):
    source = checkpoint(tmp_path / "plain", dtype="bf16")
    target = packed_folder(tmp_path / "other")
    with pytest.raises(InputError, match="already holds a checkpoint"):
        quantize_folder(source, target, find_scheme("int8"))
    quantize_folder(source, target, find_scheme("int8"), overwrite=True)
    assert load(target).scheme == find_scheme("int8")
    assert load(target).config == TINY


def test_another_type_for_the_rest(tmp_path):
    source = checkpoint(tmp_path / "plain", dtype="fp32")
    quantize_folder(source, tmp_path / "packed", find_scheme("int8"), dtype="bf16")
    assert load(tmp_path / "packed").dtype is torch.bfloat16
    assert load(tmp_path / "packed", dtype="fp32").dtype is torch.float32
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="unknown dtype"):
        load(tmp_path / "packed", dtype="fp8")


def test_stacked_experts_are_packed_one_by_one(tmp_path):
    """transformers 5 may have saved all experts of a layer as one tensor."""
    source = checkpoint(tmp_path / "plain", dtype="bf16")
    expected = load(source, quantize="int8").fingerprint

    def stack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "model.layers.1.feed_forward.experts"
        count = TINY.num_experts
        down = torch.stack([weights.pop(f"{prefix}.{e}.down_proj.weight") for e in range(count)])
        both = [
            torch.cat([weights.pop(f"{prefix}.{e}.{half}_proj.weight") for half in ("gate", "up")])
            for e in range(count)
        ]
        return weights | {f"{prefix}.down_proj": down, f"{prefix}.gate_up_proj": torch.stack(both)}

    rewrite(source, stack)
    quantize_folder(source, tmp_path / "packed", find_scheme("int8"))
    assert load(tmp_path / "packed").fingerprint == expected


def test_every_stored_tensor_has_a_home(tmp_path):
    folder = packed_folder(tmp_path, "int4", ARMS["narrow convolution, tied, one key head"])
    with WeightFiles.open(folder) as files:
        names = set(files.shapes)
    assert "lm_head.weight.values" not in names
    assert "model.embed_tokens.weight.values" in names
    assert "model.layers.0.mamba.dt_proj.weight" in names


def test_a_random_checkpoint_larger_than_a_shard_is_read_again_and_again(tmp_path, monkeypatch):
    from jamba_lm.checkpoint import packed_reader

    monkeypatch.setattr(packed_reader, "READ_BETWEEN_MAPS", 1)
    write_random_checkpoint(tmp_path / "plain", SMALL, shard_bytes=30_000)
    assert load(tmp_path / "plain", quantize="int8").scheme == find_scheme("int8")
