"""`jamba bench` measures, and says on what."""

from __future__ import annotations

import json

import pytest
import torch

from jamba_lm.analysis.workload import Timing, Workload, run_once
from jamba_lm.cli.bench import spread, summary
from jamba_lm.cli.main import main
from jamba_lm.language_model import LanguageModel
from jamba_lm.stepper import Stepper
from tests.arms import SMALL, shaken_model


def test_the_same_numbers_are_printed_for_people_and_programs(capsys, tiny_checkpoint):
    threads = torch.get_num_threads()
    command = ["bench", str(tiny_checkpoint), "--prompt-tokens", "40", "--new-tokens", "3"]
    assert main([*command, "--batch", "2", "--repeats", "2", "--threads", "1", "--json"]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    for name in ("prefill", "decode"):
        rates = values[f"{name}_tokens_per_second"]
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]
        assert f"{rates['median']:,.1f}" in printed.err
    assert values["machine"]["threads"] == 1
    assert values["workload"]["batch"] == 2
    assert values["memory"]["peak_bytes"] > values["memory"]["weight_bytes"] > 0
    assert values["backends"] == {"all layers": "native"}


def test_a_back_end_that_is_named_is_the_one_that_is_told(capsys, tiny_checkpoint):
    command = ["bench", str(tiny_checkpoint), "--prompt-tokens", "4", "--new-tokens", "1"]
    assert main([*command, "--repeats", "1", "--backend", "reference", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {"attention", "causal_conv", "selective_scan"} <= values["backends"].keys()
    assert set(values["backends"].values()) == {"reference"}


def test_the_parts_of_the_time_are_told_in_a_repetition_of_their_own(capsys, tiny_checkpoint):
    command = ["bench", str(tiny_checkpoint), "--prompt-tokens", "40", "--new-tokens", "3"]
    assert main([*command, "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] is None
    assert main([*command, "--repeats", "1", "--parts", "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)["parts"]
    for phase in ("prefill", "decode"):
        parts = values[phase]["parts"]
        assert {"in_proj", "scan", "attention", "head"} <= parts.keys()
        assert 0 < sum(part["seconds"] for part in parts.values()) <= values[phase]["seconds"]
        for part in parts.values():
            details = [value for name, value in part.items() if name != "seconds"]
            assert sum(details) == pytest.approx(part["seconds"])
    told = printed.err.partition("a step of decode, ms")
    for part in told[0].partition("prefill 40, ms")[2], told[2]:
        lines = part.splitlines()
        times = [
            float(line[24:34])
            for line in lines
            if line[24:34].strip().endswith(tuple("0123456789"))
        ]
        assert len(times) == len(values["prefill"]["parts"]) + 1
        assert times[:-1] == sorted(times[:-1], reverse=True)
    scan = next(line for line in told[2].splitlines() if line.startswith("scan "))
    assert f"{1e3 * values['decode']['parts']['scan']['seconds'] / 3:.3f}" in scan


def test_parts_of_a_model_that_is_not_read_by_native_calls_are_refused(capsys, tiny_checkpoint):
    assert main(["bench", str(tiny_checkpoint), "--parts", "--backend", "reference"]) == 2
    printed = capsys.readouterr()
    assert "only native calls say where their time goes" in printed.err
    assert "tokens/s" not in printed.err


@pytest.mark.parametrize(("batch", "prefill_tokens"), [(1, 16), (3, 16), (20, 16)])
def test_a_repetition_reads_and_writes_what_the_workload_says(
    monkeypatch, batch: int, prefill_tokens: int
):
    model = shaken_model(SMALL)
    calls: list[list[int]] = []

    def counted(run):
        def call(self, sequences, *arguments):
            calls.append([len(ids) for ids in sequences])
            return run(self, sequences, *arguments)

        return call

    monkeypatch.setattr(LanguageModel, "next_logits", counted(LanguageModel.next_logits))
    monkeypatch.setattr(Stepper, "read", counted(Stepper.read))
    timing = run_once(model, Workload(30, 4, batch, prefill_tokens))
    assert sum(map(sum, calls[:-4])) == 30 * batch
    assert all(sum(call) <= max(prefill_tokens, batch) for call in calls)
    assert calls[-4:] == [[1] * batch] * 4
    assert timing.prefill_seconds > 0 < timing.decode_seconds


def test_drafts_are_measured_and_told(capsys, tiny_checkpoint):
    command = ["bench", str(tiny_checkpoint), "--prompt-tokens", "9", "--new-tokens", "12"]
    assert main([*command, "--batch", "2", "--repeats", "1", "--draft", "lookup", "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["workload"]["draft"] == "lookup"
    counts = values["drafting"]
    assert counts["accepted"] <= counts["proposed"]
    assert 1 <= counts["calls"] <= 12
    assert f"24 tokens in {counts['calls']} call" in printed.err
    assert main([*command, "--repeats", "1", "--draft", "oracle"]) == 2
    assert "draft is 'oracle'" in capsys.readouterr().err


def test_one_of_anything_is_not_many(capsys, tiny_checkpoint):
    threads = torch.get_num_threads()
    command = ["bench", str(tiny_checkpoint), "--prompt-tokens", "4", "--new-tokens", "1"]
    assert main([*command, "--repeats", "1", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    assert "1 thread, batch 1, 1 repetition\n" in capsys.readouterr().out


def test_rates_are_tokens_of_all_sequences_over_seconds():
    timings = [Timing(2.0, 1.0, 0), Timing(1.0, 4.0, 0), Timing(4.0, 2.0, 0)]
    found = summary(Workload(100, 10, 2, 512), timings)
    assert found["prefill_tokens_per_second"] == {"median": 100.0, "min": 50.0, "max": 200.0}
    assert found["decode_tokens_per_second"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert spread([1.0, 2.0]) == {"median": 1.5, "min": 1.0, "max": 2.0}


@pytest.mark.parametrize(
    "option", ["--prompt-tokens", "--new-tokens", "--batch", "--repeats", "--prefill-tokens"]
)
def test_a_workload_of_nothing_is_refused_before_the_model_is_loaded(capsys, option: str):
    assert main(["bench", "no-such-model", option, "0"]) == 2
    assert f"error: {option} is 0" in capsys.readouterr().err
