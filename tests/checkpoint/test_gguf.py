"""Models into GGUF files and out of them again: nothing lost, or a line that says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest
import torch

from jamba_lm.checkpoint import gguf_blocks
from jamba_lm.checkpoint.gguf_config import load_gguf_config
from jamba_lm.checkpoint.gguf_names import place_of, stacked_shapes
from jamba_lm.checkpoint.gguf_reader import GgufWeights, read_gguf_decoder
from jamba_lm.checkpoint.gguf_writer import FILE_TYPES, write_gguf_model
from jamba_lm.config import JambaConfig
from jamba_lm.conversion import folder_to_gguf, gguf_to_folder
from jamba_lm.errors import CheckpointError, InputError, JambaError
from jamba_lm.gguf_file import BLOCK_TYPES, GgufFile
from jamba_lm.language_model import load
from jamba_lm.model.layout import plan_layers
from tests.arms import ARMS, SMALL, shaken_model
from tests.checkpoint.gguf_editing import edit, gguf
from tests.checkpoint.gguf_models import MODELS
from tests.tolerances import GGUF_ROUND_TRIP, assert_within

KEPT_WIDE = (
    "_norm.weight",
    ".ssm_a",
    ".ssm_d",
    "ssm_conv1d.weight",
    ".bias",
    "ffn_gate_inp.weight",
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_from_a_gguf_file(tmp_path, name, dtype):
    model = shaken_model(MODELS[name], dtype=dtype)
    model.save(tmp_path / "before")
    file_type = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[dtype]
    folder_to_gguf(tmp_path / "before", tmp_path / "x.gguf", file_type=file_type)
    gguf_to_folder(tmp_path / "x.gguf", tmp_path / "after")
    after = load(tmp_path / "after")
    assert after.config == MODELS[name]
    assert after.dtype == model.dtype
    weights = dict(after.decoder.named_parameters())
    for own, before in model.decoder.named_parameters():
        assert weights[own].dtype == before.dtype, own
        if own.endswith("log_decay_CN"):
            assert_within(weights[own], before, GGUF_ROUND_TRIP["decay"], own)
        else:
            assert torch.equal(weights[own], before), own


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_gguf_package_reads_what_was_written(tmp_path, file_type):
    path = gguf(tmp_path, file_type=file_type)
    model = load(tmp_path / "folder")
    reader = oracle.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "jamba"
    assert values["jamba.attention.head_count_kv"] == [0, 0, 2, 0]
    assert values["jamba.expert_used_count"] == 2
    assert oracle.LlamaFileType(values["general.file_type"]).name.lower().endswith(file_type)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    parameters = dict(model.decoder.named_parameters())
    assert set(stored) == set(stacked_shapes((own, p.shape) for own, p in parameters.items()))
    for own, parameter in parameters.items():
        place = place_of(own)
        tensor = stored[place.tensor]
        data = tensor.data if place.expert is None else tensor.data[place.expert]
        found = oracle.quants.dequantize(data, tensor.tensor_type)
        value = parameter.detach().float().numpy()
        if own.endswith("log_decay_CN"):
            value = -np.exp(value.astype(np.float64)).astype(np.float32)
        expected = oracle.quants.dequantize(
            oracle.quants.quantize(value, tensor.tensor_type), tensor.tensor_type
        )
        assert np.array_equal(found.reshape(value.shape), expected), own


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_llama_cpp_gets_in_float32_what_it_demands(tmp_path, file_type):
    kinds = {
        n: t.kind.name for n, t in GgufFile(gguf(tmp_path, file_type=file_type)).tensors.items()
    }
    for name, kind in kinds.items():
        if name.endswith(KEPT_WIDE):
            assert kind == "F32", name
    assert kinds["blk.0.ssm_in.weight"] == FILE_TYPES[file_type][0]
    assert kinds["blk.1.ffn_gate_exps.weight"] == FILE_TYPES[file_type][0]


def test_the_head_of_a_q4_file_is_wider(tmp_path):
    apart = GgufFile(gguf(tmp_path / "apart", file_type="q4_0")).tensors
    assert apart["output.weight"].kind.name == "Q8_0"
    assert apart["token_embd.weight"].kind.name == "Q4_0"
    tied = gguf(tmp_path / "tied", SMALL.replace(tie_embeddings=True), "q4_0")
    assert GgufFile(tied).tensors["token_embd.weight"].kind.name == "Q8_0"


def test_rows_that_are_no_whole_number_of_blocks_are_wider_and_that_is_said(tmp_path):
    shaken_model(SMALL).save(tmp_path / "folder")
    done = folder_to_gguf(tmp_path / "folder", tmp_path / "x.gguf", file_type="q8_0")
    assert any("ssm_dt.weight" in note and "F16" in note for note in done.notes)
    assert set(done.values_by_type) == {"F32", "F16", "Q8_0"}


def test_plain_weights_share_the_mapped_file(tmp_path):
    _, decoder = read_gguf_decoder(gguf(tmp_path))
    first, second = (
        decoder.get_parameter(f"blocks.1.feed_forward.experts.{e}.up_proj.weight") for e in (0, 1)
    )
    assert second.data_ptr() - first.data_ptr() == first.numel() * first.element_size()
    with torch.no_grad():
        first.zero_()
    assert (
        load(tmp_path / "model.gguf")
        .decoder.get_parameter("blocks.1.feed_forward.experts.0.up_proj.weight")
        .any()
    ), "writing to a weight wrote to the file"


def test_types_are_those_of_the_gguf_package():
    sizes = oracle.GGML_QUANT_SIZES
    for code, kind in BLOCK_TYPES.items():
        code = oracle.GGMLQuantizationType(code)
        assert (code.name, *sizes[code]) == (kind.name, kind.values, kind.size)
    known = {int(code) for code in oracle.quants._type_traits} | {0, 1}
    assert known == set(BLOCK_TYPES), "a type that the package can decode is not read, or no longer"


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([0, 1, 0, 1, 1, 0], "layers 1, 3, 4 of 6 have attention"),
        ([1, 1, 0, 0, 0, 0], "layers 0, 1 of 6 have attention"),
        ([0, 1, 0, 0, 1, 0], None),
        ([0, 0, 0, 1, 0, 0], None),
    ],
)
def test_a_pattern_that_config_json_cannot_say_is_refused(tmp_path, places, words):
    def list_layers(values, tensors):
        for key in list(values):
            if key.startswith("jamba_lm."):
                del values[key]
        values["jamba.attention.head_count_kv"] = ("int32[]", [2 * place for place in places])

    path = gguf(tmp_path, SMALL.replace(num_layers=6))
    edit(path, list_layers)
    if words is None:
        plan = plan_layers(load_gguf_config(path))
        assert [int(layer.mixer == "attention") for layer in plan] == places
    else:
        with pytest.raises(CheckpointError, match=words):
            load_gguf_config(path)


def test_a_file_of_llama_cpps_converter_has_fewer_keys_and_is_read(tmp_path):
    path = gguf(tmp_path)
    edit(path, lambda values, _: [values.pop(k) for k in list(values) if k.startswith("jamba_lm.")])
    found = load_gguf_config(path)
    assert found == SMALL.replace(initializer_range=found.initializer_range)
    assert torch.equal(load(path).logits([[1, 2, 3]])[0], load(path).logits([[1, 2, 3]])[0])


def test_every_tensor_must_fit(tmp_path):
    def spoil(values, tensors):
        del tensors["blk.0.ssm_d"]
        tensors["rope_freqs.weight"] = ("F32", (4,), bytes(16))
        kind, shape, data = tensors["blk.2.attn_k.weight"]
        tensors["blk.2.attn_k.weight"] = (kind, (shape[0] // 2, shape[1]), data[: len(data) // 2])

    path = edit(gguf(tmp_path), spoil)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "1 missing: blk.0.ssm_d" in message
    assert "1 left over: rope_freqs.weight" in message
    assert "blk.2.attn_k.weight is [8, 32], needed [16, 32]" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), float("inf"), -float("inf")])
def test_a_decay_that_is_not_negative_is_refused(tmp_path, value):
    def spoil(values, tensors):
        kind, shape, data = tensors["blk.1.ssm_a"]
        found = np.frombuffer(data, dtype=np.float32).copy()
        found[5] = value
        tensors["blk.1.ssm_a"] = (kind, shape, found.tobytes())

    path = edit(gguf(tmp_path), spoil)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ssm_a .*negative"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": ("string", "llama")}, "'llama', expected 'jamba'"),
        ({"general.architecture": ("uint32", 3)}, "expected 'jamba'"),
        ({"split.count": ("uint16", 3)}, r"one part of 3, and .* -00001-of-00003\.gguf"),
        ({"split.count": ("uint16", 0)}, "split.count is 0"),
        ({"split.count": ("string", "3")}, "split.count is string"),
        ({"jamba.block_count": ("uint32", 2**31)}, "layers are claimed"),
        ({"jamba.block_count": ("string", "4")}, "expected a whole number"),
        ({"jamba.block_count": ("uint32", 3)}, "lists 4 layers, but there are 3"),
        ({"jamba.expert_count": ("uint32", 60000)}, "60000 experts"),
        ({"jamba.expert_used_count": ("uint32", 9)}, "expected at most num_experts=4"),
        ({"jamba.ssm.inner_size": ("uint32", 65)}, "no multiple of embedding_length"),
        ({"jamba.embedding_length": ("uint32", 0)}, "embedding_length 0"),
        (
            {"jamba.attention.head_count_kv": ("int32[]", [0, 2, 0, 4])},
            "2, 4 key/value heads: config.json can only say one",
        ),
        ({"jamba.attention.head_count_kv": ("int32[]", [0, 0, -2, 0])}, "num_kv_heads"),
        ({"jamba.attention.layer_norm_rms_epsilon": ("uint32", 1)}, "expected a float"),
        ({"jamba_lm.expert_period": ("uint32", 3)}, "have experts"),
        ({"jamba_lm.eos_ids": ("string", "2")}, "expected uint32"),
        ({"tokenizer.ggml.bos_token_id": ("uint32", 97)}, "bos_id=97"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, changes, words):
    path = edit(gguf(tmp_path), lambda values, _: values.update(changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ARMS)
def test_what_llama_cpp_cannot_compute_is_refused_with_every_reason(tmp_path, name):
    model = shaken_model(ARMS[name])
    target = tmp_path / "x.gguf"
    weights = dict(model.decoder.named_parameters())
    if name.startswith("hybrid") and "rotary" not in name:
        write_gguf_model(target, model.config, weights)
        assert load_gguf_config(target) == model.config
        return
    with pytest.raises(CheckpointError, match=r"llama\.cpp cannot compute this model"):
        write_gguf_model(target, model.config, weights)
    assert not target.exists()


def test_every_reason_is_given_at_once():
    config = SMALL.replace(position="rope", expand=1, proj_bias=True)
    with pytest.raises(CheckpointError, match=r"rotary.*mamba_expand is 1.*have a bias"):
        write_gguf_model("nowhere.gguf", config, {})


def test_a_value_too_large_for_f16_is_refused_and_nothing_is_left(tmp_path):
    model = shaken_model(SMALL)
    with torch.no_grad():
        model.decoder.get_parameter("blocks.0.mixer.in_proj.weight")[3, 4] = 70000.0
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_in\.weight holds 7e\+04.*--type bf16"):
        write_gguf_model(
            tmp_path / "x.gguf",
            model.config,
            dict(model.decoder.named_parameters()),
            file_type="f16",
        )
    assert list(tmp_path.iterdir()) == []


def test_without_the_gguf_package_plain_types_still_work(tmp_path, monkeypatch):
    plain, packed = gguf(tmp_path / "plain"), gguf(tmp_path / "packed", file_type="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_blocks._quants.cache_clear()
    assert load(plain).config == SMALL
    for what in (lambda: load(packed), lambda: gguf(tmp_path / "more", file_type="q4_0")):
        with pytest.raises(JambaError, match=r"pip install 'jamba-lm\[gguf\]'"):
            what()
    gguf_blocks._quants.cache_clear()


def test_a_model_larger_than_memory_could_be_written(tmp_path):
    """Each weight is asked for twice, its shape and its value, and none is kept."""
    model = shaken_model(SMALL)
    alive = 0
    most = 0

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, own):
            nonlocal alive, most
            value = super().__getitem__(own).detach().clone()
            alive += 1
            most = max(most, alive)
            return value.as_subclass(Dying)

    class Dying(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    weights = Counted(model.decoder.named_parameters())
    write_gguf_model(tmp_path / "x.gguf", model.config, weights, file_type="bf16")
    # One being written, and one of which only the shape is looked at.
    assert most <= 3
    assert load(tmp_path / "x.gguf").config == model.config


@pytest.mark.parametrize("file_type", ["q4_k_m", "F16", ""])
def test_an_unknown_type_is_refused(tmp_path, file_type):
    with pytest.raises(InputError, match="expected one of f32, f16, bf16, q8_0, q4_0"):
        folder_to_gguf(tmp_path, tmp_path / "x.gguf", file_type=file_type)


def test_progress_reaches_the_whole(tmp_path):
    shaken_model(SMALL).save(tmp_path / "folder")
    seen: list[tuple[int, int]] = []
    done = folder_to_gguf(
        tmp_path / "folder", tmp_path / "x.gguf", progress=lambda a, b: seen.append((a, b))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (done.num_bytes, done.num_bytes)
    assert (tmp_path / "x.gguf").stat().st_size > done.num_bytes


def test_weights_can_be_had_one_by_one(tmp_path):
    weights = GgufWeights(GgufFile(gguf(tmp_path)), "fp32")
    assert weights.num_values == sum(p.numel() for p in weights.values())
    assert weights["blocks.0.mixer.conv_CW"].shape == (64, 4)
    with pytest.raises(KeyError):
        weights["blocks.9.mixer.conv_CW"]


def test_the_names_of_a_released_model_are_those_of_llama_cpp():
    """v0.1 has 531 tensors there."""
    config = JambaConfig()
    with torch.device("meta"):
        from jamba_lm.model.decoder import Decoder

        decoder = Decoder(config)
    names = stacked_shapes((own, tuple(p.shape)) for own, p in decoder.named_parameters())
    assert len(names) == 531
    assert names["blk.1.ffn_down_exps.weight"] == (16, 4096, 14336)
    known = {
        name
        for template in oracle.TENSOR_NAMES.values()
        for name in [template.format(bid=1) if "{bid}" in template else template]
    }
    for name in names:
        base = name.removesuffix(".weight").removesuffix(".bias")
        parts = base.split(".")
        assert ".".join(["blk", "1", *parts[2:]] if parts[0] == "blk" else parts) in known, name


def test_two_writings_give_the_same_bytes(tmp_path: Path):
    shaken_model(SMALL).save(tmp_path / "folder")
    for name in ("one", "other"):
        folder_to_gguf(tmp_path / "folder", tmp_path / f"{name}.gguf", file_type="q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
