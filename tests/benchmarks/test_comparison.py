"""What the comparison makes of what it measured: gates, parsing, tables, and what may be quoted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.comparison_report import bars_of, labels_of, markdown, plot
from benchmarks.comparison_verdict import problems_of
from benchmarks.cpu_inference import command
from benchmarks.engine_client import (
    EngineFailure,
    first_token_seconds,
    native_start,
    peak_bytes,
)
from benchmarks.llama_cpp import (
    AMX_CALL,
    AMX_FENCE,
    PROGRAMS,
    find,
    keep_amx_configuration,
    parse_batched_bench,
    parse_bench,
)
from benchmarks.packed_parity import (
    WEIGHT_BOUNDS,
    judged,
    largest_weight_error,
    logits_with_rows_kept,
    unpacked,
    unpacked_kind,
    weight_problem,
)
from benchmarks.parity_gate import BOUNDS, compare, divergence, first_wrong, relative_error
from jamba_lm.generation import generate
from jamba_lm.kernels.native_structs import RowRounding
from jamba_lm.language_model import load
from jamba_lm.presets import embedded_model_path
from jamba_lm.quantization.linear import PackedLinear
from jamba_lm.quantization.policy import find_scheme
from jamba_lm.quantization.rewrite import quantize_decoder
from tests.arms import shaken_model
from tests.tiny_checkpoint import tiny_config

# Rows as long as a real model's, in which the largest value lies where it does there.
WIDE = tiny_config().replace(d_model=256, d_ff=256)


def logits(seed: int = 0, tokens: int = 12, vocab: int = 50) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


# --- the gate


@pytest.mark.parametrize("scheme", WEIGHT_BOUNDS)
def test_packed_weights_are_rounded_as_far_as_their_type_explains_and_no_further(scheme: str):
    original, packed = shaken_model(WIDE), shaken_model(WIDE)
    quantize_decoder(packed.decoder, find_scheme(scheme))
    name, error = largest_weight_error(original, packed)
    assert 0.2 * WEIGHT_BOUNDS[scheme] < error
    assert weight_problem(scheme, original, packed) is None
    damaged = packed.decoder.get_submodule(name.rpartition(".")[0])
    damaged.weight.tensors()["scale"].mul_(1.25)
    problem = weight_problem(scheme, original, packed)
    assert problem is not None
    assert name in problem


def test_what_unpacked_weights_are_read_by_others_gives_the_same_logits(tmp_path: Path):
    model = shaken_model(tiny_config())
    quantize_decoder(model.decoder, find_scheme("int8"))
    model.save(tmp_path / "packed")
    with unpacked(tmp_path / "packed") as plain:
        found = load(plain, dtype="fp32").logits([[3, 4, 5]])[0]
    assert not plain.exists()
    error = relative_error(found, load(tmp_path / "packed").logits([[3, 4, 5]])[0])
    assert error < BOUNDS[unpacked_kind("int8")]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rows_that_may_be_rounded_are_kept_to_look_at_the_arithmetic_alone(scheme: str):
    models = [shaken_model(WIDE, dtype="bf16") for _ in "ab"]
    for rounding, model in zip((RowRounding.BY_ROW, RowRounding.NONE), models, strict=True):
        quantize_decoder(model.decoder, find_scheme(scheme))
        for module in model.decoder.modules():
            if isinstance(module, PackedLinear):
                module.rows8 = rounding
    ids = list(range(3, 43))
    assert torch.equal(logits_with_rows_kept(models[0], ids), models[1].logits([ids])[0])


def test_a_packed_model_is_judged_by_its_arithmetic_and_its_weights_not_by_what_rounding_costs():
    truth = logits()
    far = compare("int4", truth + logits(1), truth, [], [], truth[:0], bound=0.1)
    near = compare("int4, the same weights", truth, truth, [], [], truth[:0])
    assert far.problem is not None
    assert judged(far, near, None).problem is None
    assert judged(far, near, "damaged").problem == "damaged"
    assert judged(near, far, None).problem == far.problem
    broken = compare("int4", truth * float("nan"), truth, [], [], truth[:0], bound=0.1)
    assert judged(broken, near, None).problem == broken.problem


def test_the_same_logits_pass_in_every_type():
    truth = logits()
    greedy = truth[:4].argmax(-1).tolist()
    for kind in BOUNDS:
        parity = compare(kind, truth, truth, greedy, greedy, truth[:4])
        assert parity.problem is None
        assert (parity.error, parity.divergence, parity.top1) == (0.0, 0.0, 1.0)
        assert parity.same_greedy == parity.greedy == 4


@pytest.mark.parametrize("kind", BOUNDS)
def test_logits_beyond_the_rounding_of_their_type_are_refused(kind: str):
    truth = logits()
    found = truth + 1.5 * BOUNDS[kind] * logits(1)
    problem = compare(kind, found, truth, [], [], truth[:0]).problem
    assert problem is not None
    assert kind in problem


def test_a_tie_may_be_broken_either_way_and_a_wrong_token_may_not():
    truth = torch.tensor([[0.0, 1.0, 0.999, -1.0], [2.0, 0.0, 0.0, 0.0]])
    assert first_wrong([2, 0], truth, error=1e-3) is None
    assert first_wrong([3, 0], truth, error=1e-3) == 0
    assert first_wrong([1, 1], truth, error=1e-3) == 1


def test_a_wrong_token_is_a_problem_although_the_logits_are_right():
    truth = logits()
    worst = truth[:3].argmin(-1).tolist()
    problem = compare("bf16", truth, truth, worst, worst, truth[:3]).problem
    assert problem is not None
    assert "token 0" in problem


def test_logits_that_are_not_numbers_are_refused():
    truth = logits()
    assert compare("bf16", truth * float("nan"), truth, [], [], truth[:0]).problem is not None
    assert compare("bf16", truth[:, :3], truth, [], [], truth[:0]).problem is not None


def test_an_error_is_a_share_of_the_spread_and_a_common_shift_of_the_truth_is_none():
    truth = logits()
    noise = 0.01 * logits(1)
    one = relative_error(truth + noise, truth)
    assert one == pytest.approx(relative_error(truth + 5 + noise, truth + 5), rel=1e-3)
    assert one == pytest.approx(0.01, rel=0.2)


def test_the_divergence_is_that_of_the_definition():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()
    assert divergence(p.log(), q.log()).item() == pytest.approx(expected.item())


# --- llama.cpp


def test_the_seconds_of_llama_bench_are_read():
    test = {"n_prompt": 512, "n_gen": 0, "avg_ns": 7, "samples_ns": [72135640], "avg_ts": 7100.0}
    assert parse_bench(json.dumps([test])) == 0.07213564


@pytest.mark.parametrize("tests", [[], [{"samples_ns": [1, 2]}], [{"samples_ns": [1]}] * 2])
def test_another_number_of_results_is_not_guessed_at(tests: list[dict[str, Any]]):
    with pytest.raises(EngineFailure, match="llama-bench ran"):
        parse_bench(json.dumps(tests))


def test_the_seconds_of_llama_batched_bench_are_read():
    line = '{"pp": 16, "tg": 64, "pl": 8, "t_pp": 0.2, "t_tg": 0.75, "speed": 178.5}'
    assert parse_batched_bench(f"{line}\n\n") == 0.75
    assert parse_batched_bench(f"0.00.1 W some log{line}\n") == 0.75
    with pytest.raises(EngineFailure, match="printed 0 results"):
        parse_batched_bench("no such model\n")


def test_a_folder_that_was_built_is_found_from_any_of_its_levels(tmp_path: Path):
    programs = tmp_path / "build" / "bin"
    programs.mkdir(parents=True)
    header = tmp_path / "llama_cpp_python-1" / "vendor" / "llama.cpp" / "include" / "llama.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert find(tmp_path) is None, "nothing is built yet"
    for name in PROGRAMS:
        (programs / name).touch()
    for folder in (tmp_path, tmp_path / "build", programs):
        found = find(folder)
        assert found is not None
        assert found.programs == programs.resolve()
        assert (found.source / "include" / "llama.h").exists()


def test_the_configuration_of_tiles_is_kept_once(tmp_path: Path):
    path = tmp_path / "mmq.cpp"
    path.write_text(f"    {AMX_CALL}\n", encoding="utf-8")
    keep_amx_configuration(path)
    once = path.read_text(encoding="utf-8")
    assert once == f"    {AMX_FENCE} {AMX_CALL}\n"
    keep_amx_configuration(path)
    assert path.read_text(encoding="utf-8") == once


# --- the report


def engine(speed: float, problem: str | None = None) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "seconds": 1 / speed,
        "problem": problem,
        "disturbed": problem,
    }


def ratio(median: float, problem: str | None = None) -> dict[str, Any]:
    return {"median": median, "interval": (0.9 * median, 1.1 * median), "problem": problem}


def result() -> dict[str, Any]:
    parity = {
        "error": 0.01,
        "divergence": 1e-5,
        "top1": 0.97,
        "same_greedy": 20,
        "greedy": 24,
        "problem": None,
    }
    peaks = {
        "threads": 2,
        "fma_flops": 4e11,
        "read_bytes": 4e10,
        "product_flops": {"fp32": 2e11, "bf16": 8e11, "int8": 1.6e12},
    }
    speeds = {"jamba": 2000.0, "transformers": 100.0, "llama.cpp F16": 800, "roofline": 4000.0}
    engines = {name: engine(speed) for name, speed in speeds.items()}
    ratios = {name: ratio(2000.0 / speed) for name, speed in speeds.items() if name != "jamba"}
    return {
        "command": "python -m benchmarks.cpu_inference --shape tiny",
        "hardware": {"processor": "Example", "torch": "2", "commit": "abc"},
        "peaks": peaks,
        "peaks_after": peaks,
        "blocks": [
            {
                "shape": "tiny",
                "type": "bf16",
                "weight_bytes": 2**30,
                "parity": {
                    "engines": {name: dict(parity) for name in engines if name != "roofline"},
                    "failed": {},
                },
                "speed": {
                    "prefill 512": {
                        "rows": 512,
                        "engines": engines,
                        "ratios": ratios,
                        "failed": {},
                    }
                },
                "cold": {
                    "jamba": {
                        "first_token": engine(1.0),
                        "seconds": 0.75,
                        "peak_bytes": 2**30,
                    }
                },
            }
        ],
    }


def test_a_clean_result_has_ratios_and_no_problem():
    found = result()
    assert problems_of(found) == []
    text = markdown(found)
    assert (
        "| bf16, prefill 512 | 2,000 | 50 % | transformers 100 (**20.00x**, 18.00 to 22.00), "
        "llama.cpp F16 800 (**2.50x**, 2.25 to 2.75) |" in text
    )
    assert "| jamba bf16 | 0.75 s | 1.00 GiB | 1.00 GiB |" in text
    assert "python -m benchmarks.cpu_inference --shape tiny" in text


def test_what_may_not_be_quoted_is_in_brackets():
    found = result()
    speed = found["blocks"][0]["speed"]["prefill 512"]
    speed["engines"]["transformers"]["problem"] = "noise"
    assert problems_of(found) == [], "its ratio to ours is known all the same"
    assert "transformers [100] (**20.00x**, 18.00 to 22.00)" in markdown(found)
    speed["ratios"]["transformers"]["problem"] = "noise"
    speed["ratios"]["roofline"]["problem"] = "other noise"
    assert "| [50 %] | transformers [100] ([**20.00x**, 18.00 to 22.00])" in markdown(found)
    assert problems_of(found) == [
        "tiny bf16, prefill 512, transformers: noise",
        "tiny bf16, prefill 512, roofline: other noise",
    ]


def test_a_cold_start_that_others_disturbed_is_a_problem():
    found = result()
    found["blocks"][0]["cold"]["jamba"]["first_token"] = engine(1.0, "noise")
    assert problems_of(found) == ["tiny bf16, first token, jamba: noise"]
    assert "| jamba bf16 | [0.75 s] |" in markdown(found)


def test_the_limits_of_the_machine_are_told_as_they_were_before_and_after():
    found = result()
    found["peaks_after"] = {**found["peaks"], "read_bytes": 3e10}
    assert "memory is read at 30 to 40 GB/s" in markdown(found)
    assert "fp32 200, bf16 800, int8 1,600 G operations/s" in markdown(found)


def test_an_engine_that_computes_something_else_is_named():
    found = result()
    found["blocks"][0]["parity"]["engines"]["jamba"]["problem"] = "its logits are off"
    assert problems_of(found) == ["tiny bf16, jamba: its logits are off"]
    assert "not measured: its logits are off" in markdown(found)


def test_an_engine_that_fails_is_named_and_the_rest_is_told():
    found = result()
    block = found["blocks"][0]
    block["parity"]["failed"]["llama.cpp BF16"] = "it crashed"
    block["speed"]["prefill 512"]["failed"]["llama.cpp F16"] = "it printed nothing"
    block["cold"]["transformers"] = {"failed": "it was killed"}
    assert problems_of(found) == [
        "tiny bf16, llama.cpp BF16: it crashed",
        "tiny bf16, prefill 512, llama.cpp F16: it printed nothing",
        "tiny bf16, first token, transformers: it was killed",
    ]
    text = markdown(found)
    assert "| llama.cpp BF16 | failed: it crashed |" in text
    assert "llama.cpp F16 failed |" in text
    assert "| transformers | failed |" in text
    assert "transformers 100 (**20.00x**" in text


def test_the_command_that_is_told_says_nothing_of_this_machine():
    told = command(
        ["--shape", "mid", "--llama-cpp", "/a", "--out=/b", "--resume", "--samples", "7"]
    )
    assert told == "python -m benchmarks.cpu_inference --shape mid --samples 7"


def test_a_run_without_ours_has_no_ratios():
    found = result()
    speed = found["blocks"][0]["speed"]["prefill 512"]
    del speed["engines"]["jamba"]
    speed["ratios"] = {}
    speed["engines"]["transformers"]["problem"] = "noise"
    text = markdown(found)
    assert "| bf16, prefill 512 | not run |  | transformers [100] (ours not run)" in text
    assert problems_of(found) == ["tiny bf16, prefill 512, transformers: noise"]


def test_the_picture_has_a_bar_for_every_engine_and_is_written(tmp_path: Path):
    found = result()
    assert [(name, speed) for _, name, speed in bars_of(found["blocks"])] == [
        ("jamba", 2000.0),
        ("transformers", 100.0),
        ("llama.cpp F16", 800),
        ("roofline", 4000.0),
    ]
    assert labels_of(found["blocks"]) == ["bf16, prefill 512"]
    plot(found, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"


# --- a cold start


def test_our_cold_start_is_that_of_the_command(tmp_path: Path):
    folder = embedded_model_path()
    assert first_token_seconds("jamba", folder, "bf16", 1) > 0
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # torch alone would be 200 MiB.
    assert size < peak_bytes("jamba", folder, "bf16", 1, 64) < size + 120 * 2**20
    model = load(folder)
    ids = list(range(2, 18))
    plain = [token.id for token in generate(model, ids, max_new_tokens=4)]
    assert native_start(folder, 1, 16, 4)["ids"] == plain
    with pytest.raises(EngineFailure, match="it is no folder"):
        native_start(tmp_path / "nowhere", 1, 16, 1)
