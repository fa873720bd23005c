"""`jamba inspect` shows what a model is, without torch and at once."""

from __future__ import annotations

import json

import pytest

from jamba_lm.cli.main import main
from jamba_lm.config import JambaConfig
from jamba_lm.presets import PRESETS


def printed(capsys, *arguments):
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    assert main(["inspect", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_the_released_model_is_shown(capsys):
    text = printed(capsys, "jamba-v0.1").out
    assert text.count("m  m* m  m* A  m* m  m*") == 4
    assert "* 16 experts, 2 for each token" in text
    assert "51,570,323,328" in text
    assert "12,110,311,296" in text
    assert "attention: 32 heads of 128, 8 for keys and values, no positions" in text
    rows = [line.split()[0] for line in text.splitlines()[-9:]]
    assert rows[:5] == ["experts", "Mamba", "MLP", "embedding", "head"]
    assert rows[5:] == ["attention", "router", "norms", "all"]


def test_the_table_adds_up(capsys):
    lines = printed(capsys, "jamba-1.5-large").out.splitlines()[-9:]
    numbers = [
        [int(word.replace(",", "")) for word in line.split() if "," in word] for line in lines
    ]
    totals, active = ([row[column] for row in numbers] for column in (0, 1))
    assert sum(totals[:-1]) == totals[-1] == 398_555_145_696
    assert sum(active[:-1]) == active[-1] == 94_149_338_592


def test_a_dense_model_is_not_said_to_have_experts(capsys):
    text = printed(capsys, "jamba-reasoning-3b").out
    assert "expert" not in text
    assert "*" not in text
    assert "the head is the embedding" in text


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        (["attention_period=33", "attention_offset=32"], "attention"),
        (["attention_period=1", "attention_offset=0"], "Mamba"),
    ],
)
def test_what_a_model_lacks_is_not_mentioned(capsys, changes, absent):
    sets = [word for change in changes for word in ("--set", change)]
    assert absent not in printed(capsys, "jamba-v0.1", *sets).out


@pytest.mark.parametrize("name", [*PRESETS, "mixtral-8x7b"])
def test_json_is_one_object_and_stands_alone(capsys, name):
    output = printed(capsys, name, "--json")
    values = json.loads(output.out)
    assert JambaConfig.from_dict(values["config"]).num_layers == len(values["layers"])
    parts = values["parameters"]["by_part"].values()
    assert sum(part["total"] for part in parts) == values["parameters"]["total"]
    assert sum(part["active"] for part in parts) == values["parameters"]["active"]
    assert "parameters" in output.err


def test_a_folder_and_its_file_are_read_and_ignored_keys_are_named(capsys, tmp_path):
    config = PRESETS["tiny"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf() | {"use_mambapy": True}))
    for path in (tmp_path, tmp_path / "config.json"):
        output = printed(capsys, str(path))
        assert "19,522,640" in output.out
        assert output.err == "without effect (--json says why): use_mambapy\n"
    reasons = json.loads(printed(capsys, str(tmp_path), "--json").out)["without_effect"]
    assert reasons == {"use_mambapy": "chooses an implementation in transformers, not a result"}


def test_a_known_name_wins_over_a_folder_of_that_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PRESETS["mid"].save("tiny")
    assert "19,522,640" in printed(capsys, "tiny").out
    assert "19,522,640" not in printed(capsys, "./tiny").out


def test_bad_input_is_one_line(capsys, tmp_path):
    assert "did you mean 'jamba-v0.1'" in refused(capsys, "jamba-v01")
    assert "no model configuration at" in refused(capsys, str(tmp_path))
    assert "did you mean 'd_ff'" in refused(capsys, "tiny", "--set", "d_fff=1")
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "byte 0 is not UTF-8" in refused(capsys, str(tmp_path))
    for path in ("x" * 5000, "nul\0", "line\nbreak"):
        assert "no model" in refused(capsys, path)
