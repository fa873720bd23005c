"""`jamba train`: a recipe is trained without naming a command, and runs are drawn."""

from __future__ import annotations

import json
import re

import pytest

from jamba_lm.cli import output
from jamba_lm.cli.main import main
from tests.training.tiny_run import write_tiny_run


def written_log(folder, steps=3):
    folder.mkdir()
    records = [
        {"event": "step", "step": n, "tokens_seen": 96 * n, "loss": 6.0 - n, "gradient_norm": 1.0}
        for n in range(1, steps + 1)
    ]
    held_out = {"event": "validation", "step": steps, "bits_per_byte": 1.5}
    lines = [json.dumps(one) for one in (*records, held_out)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_recipe_needs_no_command_before_it(capsys, tmp_path):
    for words in (["train"], ["train", "run"]):
        assert main([*words, str(tmp_path / "none.toml"), "--out", str(tmp_path / "run")]) == 2
        assert "no recipe at" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "run"), str(tmp_path / "none.toml")]) == 2
    assert "no recipe at" in capsys.readouterr().err


def test_curves_of_several_runs_are_one_picture(capsys, tmp_path):
    folders = [written_log(tmp_path / name) for name in ("one", "two")]
    picture = tmp_path / "both.svg"
    assert main(["train", "plot", *map(str, folders), "--out", str(picture), "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert [one["run"] for one in result["runs"]] == ["one", "two"]
    assert result["runs"][0]["bits_per_byte"] == 1.5
    assert result["picture"] == str(picture)
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_without_a_name_the_picture_lies_in_the_first_folder(capsys, tmp_path):
    folder = written_log(tmp_path / "one")
    assert main(["train", "plot", str(folder)]) == 0
    assert (folder / "curves.png").is_file()
    assert "3 steps, 288 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["plot"], ["plot", "nowhere"]])
def test_what_cannot_be_drawn_is_one_line(capsys, arguments):
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_long_pass_says_how_far_it_is(capsys, monkeypatch, tmp_path):
    """A step of one document may take an hour, in which no step's record comes."""
    monkeypatch.setattr(output, "LOG_INTERVAL_SECONDS", 0.0)
    recipe = write_tiny_run(tmp_path / "material")
    changes = ["training.segment_tokens=40", "training.steps=3", "training.accumulate=2"]
    options = [word for change in changes for word in ("--set", change)]
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *options]) == 0
    said = capsys.readouterr().err.splitlines()
    told = [re.match(r"a pass: (\d+) of (\d+) segments of layers", line) for line in said]
    counts = [(int(one[1]), int(one[2])) for one in told if one]
    totals = {total for _, total in counts}
    assert len(totals) == 1
    # The end of a pass takes its line away; both passes of each step have one of their own.
    assert [done for done, _ in counts] == 3 * 2 * [*range(1, totals.pop())]
