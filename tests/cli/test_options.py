"""No option is lost on the short way to a model: what it cannot do, the other way does."""

from __future__ import annotations

import pytest

from jamba_lm.cli.main import main
from jamba_lm.cli.options import open_readable
from jamba_lm.errors import JambaError
from jamba_lm.language_model import LanguageModel, load
from jamba_lm.native_model import NativeModel


def test_a_plain_wish_takes_the_short_way(tiny_checkpoint):
    model = open_readable(str(tiny_checkpoint), "auto", None, 3)
    assert isinstance(model, NativeModel)
    assert model.step_plan().threads == 3


def test_weights_are_packed_when_that_is_asked_for(tiny_checkpoint):
    model = open_readable(str(tiny_checkpoint), "auto", None, None, "int8")
    assert isinstance(model, LanguageModel)
    assert model.scheme is not None
    assert model.scheme.name == "int8"


def test_an_adapter_that_is_not_there_is_missed(tiny_checkpoint, tmp_path):
    with pytest.raises(JambaError, match="adapter"):
        open_readable(str(tiny_checkpoint), "auto", None, None, None, tmp_path / "adapter")


def test_a_model_that_is_slow_for_its_type_alone_is_pointed_out(capsys, tmp_path, tiny_checkpoint):
    load(tiny_checkpoint, dtype="fp16").save(tmp_path / "half")
    command = ["bench", str(tmp_path / "half"), "--prompt-tokens", "4", "--new-tokens", "1"]
    said = "in fp16, which no native call reads: --dtype bf16 or fp32"
    for options, expected in (
        ([], True),
        (["--dtype", "bf16"], False),
        (["--backend", "reference"], False),
    ):
        assert main([*command, "--repeats", "1", *options]) == 0
        assert (said in capsys.readouterr().err) == expected, options
    assert main(["bench", str(tiny_checkpoint), *command[2:], "--repeats", "1"]) == 0
    assert said not in capsys.readouterr().err
