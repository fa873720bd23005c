"""What a GGUF file holds is told before it is loaded, and loading makes what was told."""

from __future__ import annotations

import json

import pytest
import torch

from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.checkpoint.gguf_config import load_gguf_config
from jamba_lm.checkpoint.gguf_storage import read_contents
from jamba_lm.checkpoint.gguf_writer import FILE_TYPES
from jamba_lm.cli.main import main
from jamba_lm.gguf_file import GgufFile
from jamba_lm.language_model import load
from tests.checkpoint.gguf_editing import gguf

LOADED = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "q8_0": "bf16", "q4_0": "bf16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_plan_prices_what_loading_makes_of_a_file(tmp_path, capsys, file_type):
    path = gguf(tmp_path, file_type=file_type)
    model, contents = load(path), read_contents(path)
    assert contents.loaded_as == LOADED[file_type]
    assert model.dtype == DTYPES[contents.loaded_as]
    assert main(["plan", str(path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["format"] == contents.loaded_as
    assert values["bytes"]["weights"] == weight_bytes(load_gguf_config(path), contents.loaded_as)
    assert values["bytes"]["weights"] == model.weight_bytes
    places = GgufFile(path).tensors.values()
    assert sum(one["num_bytes"] for one in values["file"]) == sum(p.size for p in places)
    assert sum(one["tensors"] for one in values["file"]) == len(places)
    assert main(["plan", str(path), "--weights", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "the file has" in printed
    assert "loading makes int8 of them" in printed


def test_inspect_does_not_call_a_gguf_file_quantised_by_a_scheme_of_ours(tmp_path, capsys):
    assert main(["inspect", str(gguf(tmp_path, file_type="q8_0")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] is None
