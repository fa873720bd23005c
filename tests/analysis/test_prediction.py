"""A prediction scales what a few layers took to the whole model, by the roofline."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Sequence

import pytest
import torch

from jamba_lm.analysis import layer_samples, machine_speed, prediction, workload
from jamba_lm.analysis.layer_samples import (
    Seconds,
    kind_of,
    sample_config,
    sample_model,
    sample_seconds,
)
from jamba_lm.analysis.machine_speed import SMALLEST_SET, measure_speeds
from jamba_lm.analysis.memory import weight_bytes
from jamba_lm.analysis.prediction import predict, reading_calls, writing_calls
from jamba_lm.analysis.roofline import Call, Speeds
from jamba_lm.analysis.workload import Workload
from jamba_lm.cli.main import main
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.layout import draw_layers, plan_layers
from jamba_lm.presets import preset
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import PACKED, quantize_decoder
from tests.arms import SMALL, shaken_model

SHORT = Workload(num_prompt_tokens=20, num_new_tokens=2, batch=2, prefill_tokens=16)

# What an imaginary machine takes for a layer of each kind, for the call and for 1,000 tokens of
# vocabulary, when it reads and when it writes.
LAYER = {"m": (5.0, 0.5), "m*": (7.0, 0.9), "A*": (4.0, 0.3), "A": (3.0, 0.2)}
CALL, WORDS = (2.0, 0.1), (0.25, 0.0125)


def imaginary(copies: Sequence[LanguageModel], workload: Workload) -> Seconds:
    model = copies[0]

    def seconds(phase: int) -> float:
        layers = sum(LAYER[name][phase] for name in draw_layers(model.config).split())
        return layers + CALL[phase] + WORDS[phase] * model.config.vocab_size / 1000

    return Seconds(seconds(0), seconds(1))


@pytest.fixture
def imaginary_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds(2, 4e10, {"fp32": 2e11, "bf16": 8e11, "int8": 16e11, "scan": 1e10})
    monkeypatch.setattr(prediction, "measure_speeds", lambda working_set: speeds)


def test_the_parts_add_up_to_the_model_on_a_machine_that_is_their_sum(imaginary_limits):
    workload = Workload(512, 1, 1, 512)
    found = predict(SMALL, "bf16", workload, measured=imaginary)
    whole = imaginary([sample_model(SMALL, "bf16")], workload)
    assert found.prefill.seconds == pytest.approx(whole.prefill)
    assert found.decode.seconds == pytest.approx(whole.decode, rel=1e-3)
    assert found.prefill.tokens_per_second == pytest.approx(512 / whole.prefill)


def test_a_prompt_in_pieces_costs_a_call_for_each_and_attention_grows(imaginary_limits):
    one = predict(SMALL, "bf16", Workload(512, 1, 1, 512), measured=imaginary).prefill
    four = predict(SMALL, "bf16", Workload(2048, 1, 1, 512), measured=imaginary).prefill
    assert 4 * one.seconds < four.seconds < 6 * one.seconds
    assert four.tokens == 4 * one.tokens
    assert sum(four.parts.values()) == pytest.approx(four.floor_seconds)


@pytest.mark.parametrize("slow_round", range(layer_samples.ROUNDS))
def test_a_machine_that_is_slow_for_some_seconds_is_predicted_as_it_is(
    imaginary_limits, slow_round: int
):
    """Samples take turns, so that a slow while is the same one for all, and no median."""
    workload, names = Workload(512, 1, 1, 512), list[str]()

    def seen(copies: Sequence[LanguageModel], asked: Workload) -> Seconds:
        config = copies[0].config
        names.append(f"{draw_layers(config)} {config.vocab_size}")
        return imaginary(copies, asked)

    undisturbed = predict(SMALL, "bf16", workload, measured=seen)
    samples = len(set(names))
    assert names == names[:samples] * layer_samples.ROUNDS
    calls = itertools.count()

    def disturbed(copies: Sequence[LanguageModel], asked: Workload) -> Seconds:
        slow = next(calls) // samples == slow_round
        return imaginary(copies, asked).times(5.0 if slow else 1.0)

    assert predict(SMALL, "bf16", workload, measured=disturbed) == undisturbed


def test_samples_that_do_not_fit_together_are_timed_one_by_one(
    imaginary_limits, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layer_samples, "CACHED_BYTES", 1)
    workload, alive, most = Workload(512, 1, 1, 512), [0], [0]
    together = predict(SMALL, "bf16", workload, measured=imaginary)
    largest = weight_bytes(SMALL, "bf16")
    make = layer_samples.sample_model

    def counted(config: JambaConfig, weights: str) -> LanguageModel:
        model = make(config, weights)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(model, lambda: alive.__setitem__(0, alive[0] - 1))
        return model

    monkeypatch.setattr(layer_samples, "sample_model", counted)
    assert predict(SMALL, "bf16", workload, measured=imaginary) == together
    assert most[0] > 2
    most[0] = 0
    for module in (prediction, layer_samples):
        monkeypatch.setattr(module, "usable_memory", lambda: 2 * largest)
    assert predict(SMALL, "bf16", workload, measured=imaginary) == together
    assert most[0] == 1


@pytest.mark.parametrize("cached", [1, 3 << 20, 1 << 40])
def test_copies_of_a_sample_fill_the_caches_as_the_model_does(
    imaginary_limits, monkeypatch: pytest.MonkeyPatch, cached: int
):
    """Else layers of a model that no cache holds would be timed where a cache holds them."""
    monkeypatch.setattr(layer_samples, "CACHED_BYTES", cached)
    model, several = SMALL.replace(num_layers=64), list[int]()

    def seen(copies: Sequence[LanguageModel], asked: Workload) -> Seconds:
        # Weights of their own: none may find another's in the cache.
        matrices = {one.decoder.embedding.weight.data_ptr() for one in copies}
        assert len(matrices) == len(copies)
        size = weight_bytes(copies[0].config, "bf16")
        whole = min(weight_bytes(model, "bf16"), cached)
        assert len(copies) == 1 or whole - size < len(copies) * size <= whole
        several.append(len(copies))
        return imaginary(copies, asked)

    predict(model, "bf16", Workload(512, 1, 1, 512), measured=seen)
    assert (max(several) > 1) == (cached > 1)


def test_copies_write_in_turns_and_what_is_told_is_of_one(monkeypatch: pytest.MonkeyPatch):
    turns, write = list[LanguageModel](), workload._Sequences.write

    def seen(sequences: workload._Sequences) -> None:
        turns.append(sequences._model)
        write(sequences)

    monkeypatch.setattr(workload._Sequences, "write", seen)
    copies = [sample_model(sample_config(SMALL, ("mamba", "mlp"), 1, 50), "bf16") for _ in "abc"]
    found = workload.run_in_turns(copies, SHORT)
    assert turns == copies * SHORT.num_new_tokens
    assert found.state_bytes == workload.run_once(copies[0], SHORT).state_bytes


@pytest.mark.parametrize(("asked", "written"), [(4, 4), (64, 64), (10**6, 50_000)])
def test_a_sample_of_a_small_model_writes_as_long_an_answer_as_the_model(
    monkeypatch: pytest.MonkeyPatch, asked: int, written: int
):
    """At 2 microseconds a token by the roofline, there is time for 50,000."""
    monkeypatch.setattr(prediction, "floor_seconds", lambda works, speeds: 2e-6)
    speeds = Speeds(2, 4e10, {})
    found = prediction.sampled_workload(SMALL, "bf16", Workload(600, asked, 2, 512), speeds)
    assert found == Workload(256, written, 2, 512)


def test_a_sample_of_a_large_model_writes_a_few_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prediction, "floor_seconds", lambda works, speeds: 0.1)
    speeds = Speeds(2, 4e10, {})
    found = prediction.sampled_workload(SMALL, "bf16", Workload(600, 64, 1, 512), speeds)
    assert found == Workload(512, prediction.FEWEST_NEW_TOKENS, 1, 512)


def test_the_calls_are_those_of_the_workload():
    assert reading_calls(SHORT) == [Call(2, 8, 0), Call(2, 8, 8), Call(2, 4, 16)]
    assert writing_calls(SHORT) == [Call(2, 1, 20), Call(2, 1, 21)]


@pytest.mark.parametrize("name", ["tiny", "mid", "3b", "jamba-1.5-large"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_sample_has_layers_of_one_kind_as_wide_as_the_model_s(name: str, layers: int):
    config = preset(name)
    for kind in {kind_of(spec) for spec in plan_layers(config)}:
        sample = sample_config(config, kind, layers, 100)
        assert [kind_of(spec) for spec in plan_layers(sample)] == [kind] * layers
        for width in ("d_model", "d_ff", "d_inner", "num_heads", "num_experts", "dt_rank"):
            assert getattr(sample, width) == getattr(config, width)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "experts-int8", "int4"])
def test_a_sample_is_a_working_model_of_its_type(weights: str):
    config = sample_config(SMALL, ("mamba", "moe"), 2, 100)
    model = sample_model(config, weights)
    logits = model.next_logits([[1, 2, 3]])
    assert torch.isfinite(logits).all()
    assert len(set(logits[0].tolist())) > 50, "no two tokens need be alike"
    packed = any(isinstance(module, PACKED) for module in model.decoder.modules())
    assert packed == (weights not in ("fp32", "bf16"))


@pytest.mark.parametrize("weights", ["int8", "experts-int8", "experts-int4", "int4"])
@pytest.mark.parametrize("kind", [("mamba", "moe"), ("attention", "mlp")])
def test_a_sample_is_packed_as_a_model_is(weights: str, kind: tuple[str, str]):
    """To the rows that its products round, or it would be timed doing something else."""
    config = sample_config(SMALL.replace(d_model=64, d_ff=64), kind, 2, 100)
    loaded = shaken_model(config).decoder.bfloat16()
    quantize_decoder(loaded, find_scheme(weights))
    sampled = sample_model(config, weights).decoder

    def packed(decoder: Decoder) -> dict[str, tuple[object, ...]]:
        return {
            name: (type(module), type(module.weight), getattr(module, "rows8", None))
            for name, module in decoder.named_modules()
            if isinstance(module, PACKED)
        }

    assert packed(sampled) == packed(loaded)
    assert packed(sampled)


def test_a_sample_takes_time():
    found = sample_seconds(
        [sample_model(sample_config(SMALL, ("mamba", "mlp"), 1, 50), "bf16")] * 3, SHORT
    )
    assert found.prefill > 0
    assert found.decode > 0


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    for module in (prediction, layer_samples):
        monkeypatch.setattr(module, "usable_memory", lambda: 10 * 1024**2)
    with pytest.raises(CapacityError, match="cannot be predicted"):
        sample_model(preset("jamba-v0.1"), "bf16")
    with pytest.raises(CapacityError, match="this machine has 10,485,760"):
        predict(preset("jamba-v0.1"), "bf16", SHORT)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure everything once, and small: what is found is not looked at."""
    monkeypatch.setattr(layer_samples, "FEWEST_REPEATS", 1)
    monkeypatch.setattr(layer_samples, "SAMPLE_TIME", 0.0)
    monkeypatch.setattr(machine_speed, "FEWEST_TRIES", 1)
    monkeypatch.setattr(machine_speed, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(machine_speed, "PRODUCT_WIDTH", 256)
    monkeypatch.setattr(machine_speed, "LARGEST_SET", SMALLEST_SET)


def test_a_machine_has_speeds(fast):
    speeds = measure_speeds(SMALLEST_SET)
    assert speeds.threads == torch.get_num_threads()
    assert speeds.read_bytes > 1e8
    assert all(amount > 1e6 for amount in speeds.amounts.values())


# --- the commands


def test_plan_predicts_when_it_is_asked(capsys, tiny_checkpoint, fast):
    command = ["plan", str(tiny_checkpoint), "--this-machine", "--batch", "2"]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["prediction"]
    assert found["workload"]["batch"] == 2
    for phase in ("prefill", "decode"):
        assert found[phase]["tokens_per_second"] > 0
        assert found[phase]["roofline_tokens_per_second"] > 0
        assert f"{found[phase]['tokens_per_second']:,.1f}" in printed.err
    assert found["machine"]["read_bytes_per_second"] > 0


def test_the_doctor_measures_when_it_is_asked(capsys, fast):
    assert main(["doctor", "--json"]) == 0
    assert "measured" not in json.loads(capsys.readouterr().out)
    assert main(["doctor", "--measure", "--json"]) == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)["measured"]
    assert set(measured["operations_per_second"]) == {"fp32", "bf16", "int8", "scan"}
    assert "GB/s read from memory" in printed.err


def test_the_doctor_predicts_the_model_that_it_is_given(capsys, tiny_checkpoint, fast):
    assert main(["doctor", str(tiny_checkpoint), "--weights", "int8", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["prediction"]
    assert found["format"] == "int8"
    assert found["decode"]["tokens_per_second"] > 0
    assert "predicted" in printed.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["doctor", "no-such-model"], "no model 'no-such-model'"),
        (["doctor", "tiny", "--weights", "int3"], "no weight format 'int3'"),
        (["plan", "jamba-1.5-large", "--this-machine"], "cannot be predicted"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(capsys, fast, arguments, word):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert word in line
