"""The doctor tells who serves each operation, and why not the others."""

from __future__ import annotations

import json

import pytest

from jamba_lm.analysis import machine_speed
from jamba_lm.cli.main import main
from jamba_lm.kernels import library, native, ops, reference, report
from jamba_lm.language_model import load


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAMBA_BACKEND", raising=False)


def told(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_operation_is_listed_with_its_server(capsys):
    found = told(capsys)
    assert set(found["operations"]) == reference.OPERATIONS
    best = library.loaded_library().paths_here[0]
    assert found["operations"]["selective_scan"] == {
        "backend": "native",
        "method": f"C++, {best}",
        "refusals": {"reference": "it is slower"},
    }
    assert found["library"]["instruction_sets"][best] is True
    assert found["versions"]["torch"]
    assert found["memory"] > 0


def test_a_person_reads_the_same(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for operation in reference.OPERATIONS:
        assert f"\n{operation} " in text
    assert "reference: it is slower" in text


def test_a_missing_library_is_told_with_the_remedy(capsys, monkeypatch):
    reason = "libjamba_kernels.so was not built (run `make native`)"
    for module in (native, report):
        monkeypatch.setattr(module, "find_library", lambda: reason)
    found = told(capsys)
    assert found["library"]["problem"] == reason
    assert found["operations"]["selective_scan"] == {
        "backend": "reference",
        "method": "plain PyTorch",
        "refusals": {"native": reason},
    }
    assert main(["doctor"]) == 0
    assert f"kernels     none: {reason}" in capsys.readouterr().out


def test_a_wish_is_obeyed_and_told(capsys, monkeypatch):
    monkeypatch.setenv("JAMBA_BACKEND", "reference")
    found = told(capsys)
    assert found["jamba_backend"] == "reference"
    assert found["operations"]["rms_norm"]["backend"] == "reference"
    assert found["operations"]["rms_norm"]["refusals"] == {
        "native": "JAMBA_BACKEND names reference"
    }


def test_a_wish_that_cannot_be_met_is_an_answer_not_an_error(capsys, monkeypatch):
    monkeypatch.setenv("JAMBA_BACKEND", "abacus")
    found = told(capsys)
    assert found["operations"]["rms_norm"]["backend"] is None
    known = ", ".join(ops.BACKENDS)
    assert found["operations"]["rms_norm"]["refusals"] == {
        "abacus": f"no backend 'abacus'; choose one of {known}"
    }
    assert main(["doctor"]) == 0
    assert "nobody" in capsys.readouterr().out


def test_whether_generating_waits_for_torch_is_told_with_the_reason(
    capsys, monkeypatch, tmp_path, tiny_checkpoint
):
    monkeypatch.setattr(machine_speed, "LARGEST_SET", machine_speed.SMALLEST_SET)
    assert main(["doctor", str(tiny_checkpoint), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["start"]
    assert (found["torch"], found["reason"]) == (False, None)
    assert f"{tiny_checkpoint} generates without importing torch" in printed.err
    load(tiny_checkpoint, dtype="fp16").save(tmp_path / "half")
    assert main(["doctor", str(tmp_path / "half"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "F16" in json.loads(printed.out)["start"]["reason"]
    assert "generates with torch" in printed.err
