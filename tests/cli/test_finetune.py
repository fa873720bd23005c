"""`jamba finetune` and `jamba adapter`, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jamba_lm.cli.main import main
from tests.finetuning.tiny_tuning import write_tiny_tuning


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tuning(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def tuned(recipe: Path) -> Path:
    folder = recipe.parent / "run"
    assert main(["finetune", str(recipe), "--out", str(folder)]) == 0
    return folder


def test_it_shows_first_what_is_trained_and_trains_nothing(recipe, capsys):
    assert main(["finetune", str(recipe), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    trained = {one["part"] for one in found["parts"] if one["trained"]}
    assert "experts.down_proj" in trained
    assert not trained & {"router", "embedding", "norms, convolutions, decays, biases"}
    assert found["trained"] == sum(one["trained"] for one in found["parts"])
    assert found["data"]["training"]["records"] == {"read": 10, "used": 10}
    assert "adapters got a gradient from the first batch" in err
    assert not (recipe.parent / "run2").exists()


def test_what_is_trained_can_be_used_merged_and_looked_at(recipe, tuned, tmp_path, capsys):
    model, adapter = str(recipe.parent / "model"), str(tuned / "adapter")
    prompt = ["--prompt", "Once", "--max-tokens", "4", "--temperature", "0", "--json"]
    assert main(["adapter", "merge", model, adapter, "--out", str(tmp_path / "merged")]) == 0
    assert "changed 46 and replaced 0 weights" in capsys.readouterr().out
    texts = []
    for named in ([model, "--adapter", adapter], [str(tmp_path / "merged")], [model]):
        assert main(["generate", *named, *prompt]) == 0
        texts.append(json.loads(capsys.readouterr().out)["ids"])
    assert texts[0] == texts[1] != texts[2]
    assert main(["adapter", "inspect", model, adapter, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["rank"] for one in found["changes"].values()} == {2, 4}
    assert {one["scale"] for one in found["changes"].values()} == {2.0}
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a river.")
    assert main(["score", model, str(text), "--adapter", adapter]) == 0


DROPOUT_AND_STEP = ["--set", "adapter.dropout=0.1", "--set", "loss.balance_over=step"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x", "--dry-run"], "--dry-run writes nothing"),
        ([], "no --out"),
        (["--out", "x", "--resume", "--auto"], "--resume and --auto"),
        (["--dry-run", "--set", "adapter.rang=3"], "did you mean 'rank'"),
        (["--dry-run", "--set", "adapter.targets=[\"convolution\"]"], "this model has none"),
        (["--dry-run", "--set", "model.base=nowhere"], "nowhere"),
        (["--dry-run", "--set", "data.bad_records=ignored"], "'refused' or 'dropped'"),
        (["--dry-run", *DROPOUT_AND_STEP], "leave one of them out"),
        (["--dry-run", "--set", "training.batch_tokens=8"], "at least one whole sequence"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(recipe, capsys, arguments, said):
    assert main(["finetune", str(recipe), *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert said in err
