"""What a fine-tuning run does, leaves behind, and refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import jamba_lm
from jamba_lm.adapter_merge import merge_adapter
from jamba_lm.errors import CheckpointError, DataError, InputError, RecipeError
from jamba_lm.finetuning import tuning
from jamba_lm.finetuning.recipe_file import load_tuning_recipe
from tests.finetuning.tiny_tuning import write_jsonl, write_tiny_tuning
from tests.tolerances import FINETUNING, SEGMENTS, assert_within

IDS = [1, 40, 41, 42, 90, 91, 92, 17]


def run(recipe_path: Path, folder: Path, changes: list[str] | None = None, **options: object):
    recipe = load_tuning_recipe(recipe_path, changes or [])
    return tuning.finetune(recipe, folder, tuning.Tuning(recipe), **options)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tuning(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def adapted(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    assert run(recipe_path, folder).finished
    return folder


def log_of(folder: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {key: one[key] for key in one if key not in ("seconds", "tokens_per_second", "mfu")}
        for one in records
    ]


def losses(folder: Path) -> list[float]:
    return [float(one["loss"]) for one in log_of(folder) if one["event"] == "step"]  # type: ignore[arg-type]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_an_adapter_learns_and_leaves_the_model_alone(adapted, recipe_path):
    found = losses(adapted)
    assert found[-1] < found[0] - 0.3
    base = recipe_path.parent / "model"
    plain = jamba_lm.load(base).logits([IDS])[0]
    tuned = jamba_lm.load(base, adapter=adapted / "adapter").logits([IDS])[0]
    assert float((plain - tuned).abs().max()) > 0.1


def test_the_adapter_written_is_the_one_that_was_validated(adapted, recipe_path):
    recipe = load_tuning_recipe(recipe_path)
    base = recipe_path.parent / "model"
    tokenizer = jamba_lm.load_tokenizer(base)
    text = tuning.TuningText(recipe, tokenizer)
    model = jamba_lm.load(base, adapter=adapted / "adapter")
    nats, count = 0.0, 0
    for one in text.held_out.examples:
        logits = model.logits([one.ids[:-1].tolist()])[0].log_softmax(-1)
        for at in one.learned.nonzero()[0]:
            nats -= float(logits[at - 1, int(one.ids[at])])
            count += 1
    last = [one for one in log_of(adapted) if one["event"] == "validation"][-1]
    assert last["num_tokens"] == count
    assert nats / count == pytest.approx(last["loss"], rel=FINETUNING["merged"])


def test_full_fine_tuning_trains_every_weight(tmp_path):
    path = write_tiny_tuning(tmp_path / "full", adapter=False)
    assert run(path, tmp_path / "run").finished
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3
    before = dict(jamba_lm.load(path.parent / "model").decoder.named_parameters())
    after = jamba_lm.load(tmp_path / "run" / "model")
    same = [n for n, x in after.decoder.named_parameters() if torch.equal(x, before[n])]
    assert same == []
    # It can be talked to as the one it was made from.
    tokenizer = jamba_lm.load_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.chat_template is not None


def test_a_second_run_has_the_same_bits(adapted, recipe_path, tmp_path):
    run(recipe_path, tmp_path)
    assert adapter_bytes(tmp_path) == adapter_bytes(adapted)


@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_stopped_and_resumed_it_has_the_same_bits(recipe_path, tmp_path, dropout):
    changes = [f"adapter.dropout={dropout}", "training.accumulate=2"]

    def stop(record):
        if record["event"] == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    run(recipe_path, tmp_path / "whole", changes)
    assert not run(recipe_path, tmp_path / "stopped", changes, report=stop).finished
    assert run(recipe_path, tmp_path / "stopped", changes, resume="always").finished
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_workers_and_layers_computed_again_change_nothing(recipe_path, tmp_path):
    changes = ["adapter.dropout=0.3", "training.accumulate=2"]
    run(recipe_path, tmp_path / "plain", changes)
    threads = torch.get_num_threads()
    try:
        more = ["training.workers=2", "training.recompute_layers=true"]
        run(recipe_path, tmp_path / "other", [*changes, *more])
    finally:
        torch.set_num_threads(threads)
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "plain")


@pytest.mark.parametrize(
    "changes",
    [
        ['adapter.targets=["mamba"]'],
        ['adapter.targets=["embedding", "head", "experts"]', "training.accumulate=2"],
        ["model.quantize=int8"],
        ["adapter=none"],
    ],
    ids=" ".join,
)
def test_passes_in_segments_learn_the_same(tmp_path, changes):
    """What no layer learns anything in is frozen, and gets no gradient there either."""
    path = write_tiny_tuning(tmp_path, adapter=changes != ["adapter=none"])
    changes = [one for one in changes if one != "adapter=none"]
    run(path, tmp_path / "plain", changes)
    run(path, tmp_path / "cut", [*changes, "training.segment_tokens=20"])
    found, expected = losses(tmp_path / "cut"), losses(tmp_path / "plain")
    assert found == pytest.approx(expected, rel=SEGMENTS["run"])
    assert found[-1] < found[0] - 0.1


def test_a_full_run_does_not_go_on_as_an_adapter(tmp_path, recipe_path):
    path = write_tiny_tuning(tmp_path / "full", adapter=False)
    run(path, tmp_path / "run", ["training.steps=2"])
    with pytest.raises(RecipeError, match=r"adapter\.\w+ is .*, but the run to resume has None"):
        run(path, tmp_path / "run", ["adapter.rank=2"], resume="always")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_an_adapter_learns_over_a_quantised_model(tmp_path, scheme):
    path = write_tiny_tuning(tmp_path)
    changes = [f"model.quantize={scheme}"]
    assert run(path, tmp_path / "run", changes).finished
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3


def test_a_merged_model_is_the_model_with_its_adapter(adapted, recipe_path, tmp_path):
    base = recipe_path.parent / "model"
    merged = merge_adapter(base, adapted / "adapter", tmp_path / "merged")
    assert merged.replaced == 0
    beside = jamba_lm.load(base, adapter=adapted / "adapter")
    after = jamba_lm.load(tmp_path / "merged")
    for name, parameter in after.decoder.named_parameters():
        assert torch.equal(parameter, beside.decoder.get_parameter(name)), name
    assert jamba_lm.load_tokenizer(tmp_path / "merged").chat_template is not None
    packed = jamba_lm.load(base, quantize="int8", adapter=adapted / "adapter")
    again = jamba_lm.load(tmp_path / "merged", quantize="int8")
    assert torch.equal(packed.logits([IDS])[0], again.logits([IDS])[0])


def test_an_adapter_is_not_added_to_a_quantised_model(adapted, recipe_path, tmp_path):
    jamba_lm.load(recipe_path.parent / "model", quantize="int8").save(tmp_path / "packed")
    with pytest.raises(InputError, match="quantised already"):
        jamba_lm.load(tmp_path / "packed", adapter=adapted / "adapter")
    with pytest.raises(InputError, match="quantised already"):
        merge_adapter(tmp_path / "packed", adapted / "adapter", tmp_path / "merged")


def test_a_bfloat16_model_is_rounded_once(adapted, recipe_path, tmp_path):
    base = jamba_lm.load(recipe_path.parent / "model", dtype="bf16")
    base.save(tmp_path / "narrow")
    merge_adapter(tmp_path / "narrow", adapted / "adapter", tmp_path / "merged")
    found = jamba_lm.load(tmp_path / "merged")
    wide = jamba_lm.load(tmp_path / "narrow", dtype="fp32", adapter=adapted / "adapter")
    for name, parameter in wide.decoder.named_parameters():
        assert torch.equal(found.decoder.get_parameter(name), parameter.to(found.dtype)) or (
            parameter.dtype == torch.float32 and name.endswith(("log_decay_CN", "skip_C"))
        ), name


def test_a_target_that_matches_nothing_is_refused(recipe_path):
    recipe = load_tuning_recipe(recipe_path, ['adapter.targets=["in_proj", "gate_in"]'])
    with pytest.raises(RecipeError, match="names 'gate_in', and this model has none"):
        tuning.Tuning(recipe)


def test_what_is_trained_is_counted(recipe_path):
    recipe = load_tuning_recipe(recipe_path, ['adapter.targets=["experts.up_proj", "dt_proj"]'])
    prepared = tuning.Tuning(recipe).prepared
    decoder = jamba_lm.load(recipe_path.parent / "model").decoder
    assert prepared.total == sum(x.numel() for x in decoder.parameters())
    trained = {share.part: share.trained for share in prepared.shares if share.trained}
    config = decoder.config
    up = config.num_experts * 2 * 2 * (config.d_model + config.d_ff)
    assert trained == {
        "experts.up_proj": up,
        "mamba.dt_proj": 3 * 2 * (config.dt_rank + config.d_inner),
    }


def test_an_adapter_without_a_gradient_is_refused(tmp_path):
    """Where a token is predicted from the beginning alone, there is nothing to choose between."""
    path = write_tiny_tuning(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [{"text": "Once upon a time"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "there was a river"}])
    short = ["data.sequence_tokens=2", 'adapter.targets=["q_proj", "v_proj"]']
    with pytest.raises(RecipeError, match=r"1 of 2 adapters get no gradient.*mixer\.q_proj"):
        tuning.Tuning(load_tuning_recipe(path, short))
    tuning.Tuning(load_tuning_recipe(path, [*short, "data.sequence_tokens=3"]))


def test_a_quantised_model_is_not_trained_as_a_whole(tmp_path):
    path = write_tiny_tuning(tmp_path, adapter=False)
    jamba_lm.load(tmp_path / "model", quantize="int8").save(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    with pytest.raises(RecipeError, match="packed weights cannot be trained"):
        tuning.Tuning(load_tuning_recipe(path, [f"model.base={tmp_path / 'packed'}"]))


def test_other_records_do_not_resume_a_run(tmp_path):
    path = write_tiny_tuning(tmp_path)
    run(path, tmp_path / "run", ["training.steps=2"])
    write_jsonl(tmp_path / "train.jsonl", [{"text": "Something else."}])
    with pytest.raises(DataError, match="not what this run was reading"):
        run(path, tmp_path / "run", resume="always")


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    other = jamba_lm.from_config(
        jamba_lm.load(jamba_lm.embedded_model_path()).config.replace(num_layers=2)
    )
    other.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"it is for another model|does not have"):
        jamba_lm.load(tmp_path / "other", adapter=adapted / "adapter")


def test_a_merged_head_and_a_plain_one_agree(adapted, recipe_path):
    """Beside the base or inside of it: the sums are other ones, the answer is the same."""
    from jamba_lm.checkpoint.adapter_reader import read_adapter

    base = jamba_lm.load(recipe_path.parent / "model")
    found = read_adapter(adapted / "adapter", base.config)
    name = "blocks.0.mixer.in_proj.weight"
    x = torch.randn(5, base.config.d_model, generator=torch.Generator().manual_seed(1))
    change = found.changes[name]
    weight = base.decoder.get_parameter(name)
    beside = x @ weight.T + change.scale * (x @ change.down_RI.T) @ change.up_OR.T
    assert_within(x @ change.added_to(weight).T, beside, FINETUNING["merged"])
