"""`jamba plan` answers exactly, without torch and at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.memory import CACHE_ROOM_TOKENS, WEIGHT_FORMATS, memory_rates
from jamba_lm.cli.main import main
from jamba_lm.cli.quantities import parse_bytes, parse_tokens, show_bytes
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError

SOURCE = Path(__file__).resolve().parent.parent.parent / "src"


def printed(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr()


def answer(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json").out)


def refused(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


RELEASED = ["jamba-v0.1", "--context", "256K", "--batch", "1", "--weights", "int8"]


def test_the_released_model_fits_80_gib(capsys):
    text = printed(capsys, *RELEASED, "--memory", "80GiB").out
    for line in (
        "weights                        48.13 GiB          51,682,106,624",
        "key/value cache                 4.00 GiB           4,294,967,296",
        "Mamba scan states              14.00 MiB              14,680,064",
        "Mamba convolution states        1.31 MiB               1,376,256",
        "all of these, exactly          52.15 GiB          55,993,130,240",
        "fits, to spare                 27.85 GiB          29,906,215,680",
    ):
        assert line in text
    assert "activations" in text.splitlines()[-1], "the answer says what it leaves out"


def test_what_does_not_fit_is_said_so_and_is_not_a_failure(capsys):
    text = printed(capsys, *RELEASED, "--memory", "40GiB").out
    assert "does NOT fit, missing          12.15 GiB" in text
    assert "none fits" in text
    assert answer(capsys, *RELEASED, "--memory", "40GiB")["fits"] is False


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("chunk", [[], ["--chunk", "4K"], ["--chunk", "all"]])
def test_the_largest_context_and_batch_fit_and_one_more_does_not(capsys, weights, chunk):
    question = ["jamba-reasoning-3b", "--weights", weights, *chunk, "--memory", "50GB"]
    found = answer(capsys, *question, "--context", "20000")
    context, batch = found["largest"]["context"], found["largest"]["batch"]

    def fits(context, batch):
        shape = ["--context", str(context), "--batch", str(batch)]
        return answer(capsys, *question, *shape)["fits"]

    assert fits(context, 1)
    assert not fits(context + 1, 1)
    assert fits(20000, batch)
    assert not fits(20000, batch + 1)


def test_a_model_without_attention_has_no_longest_context(capsys):
    sets = ["--set", "attention_period=33", "--set", "attention_offset=32"]
    found = answer(capsys, "jamba-v0.1", *sets, "--memory", "1TiB")
    assert found["bytes"]["kv_cache"] == 0
    assert found["largest"]["context"] is None
    text = printed(capsys, "jamba-v0.1", *sets, "--memory", "1TiB").out
    assert "longest context for a batch of 1: not limited by memory" in text


def test_defaults_are_the_model_s_context_and_this_machine(capsys):
    found = answer(capsys, "jamba-v0.1")
    assert (found["context"], found["batch"], found["format"]) == (262144, 1, "bf16")
    assert found["memory"] == usable_memory()
    assert found["chunk"] is None
    assert found["bytes"]["activations_estimate"] == 0


def test_an_estimate_is_called_one(capsys):
    arguments = ["jamba-v0.1", "--context", "8K", "--batch", "2", "--chunk", "1K"]
    text = printed(capsys, *arguments).out
    assert "activations, estimated" in text
    assert "fitted to the paper's Figure 2" in text
    found = answer(capsys, *arguments)
    plan = memory_rates(JambaConfig()).plan(tokens=8192, batch=2, chunk=1024)
    assert found["bytes"]["activations_estimate"] == plan.activations == 2 * 1024 * 4096 * 48
    assert found["bytes"]["total"] == plan.total


def test_a_context_beyond_the_model_s_is_answered_with_a_word(capsys):
    output = printed(capsys, "llama-2-7b", "--context", "256K", "--memory", "1TiB")
    assert "128.00 GiB" in output.out
    assert "made for 4,096 tokens" in output.err


def test_the_help_names_the_room_that_a_cache_keeps(capsys):
    main(["plan", "model", "--help"])
    assert f"{CACHE_ROOM_TOKENS:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int3"], "no weight format 'int3' among fp32"),
        (["--memory", "80G"], "--memory is '80G': expected a size such as 80GiB"),
        (["--memory", "lots"], "--memory is 'lots'"),
        (["--memory", "-5GiB"], "--memory is '-5GiB'"),
        (["--context", "0"], "--context is '0': expected a number of tokens"),
        (["--context", "256KB"], "--context is '256KB'"),
        (["--context", "9" * 5000], "expected a number of tokens"),
        (["--context", "٣"], "expected a number of tokens"),
        (["--batch", "0"], "--batch is 0: expected 1 or more"),
        (["--batch", "9" * 30], "--batch is 9999"),
        (["--batch", "two"], "two"),
        (["--chunk", "0"], "--chunk is '0'"),
        (["--set", "num_layers"], "expected NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert message in refused(capsys, "jamba-v0.1", *arguments)


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_no_heavy_package_is_imported(command):
    code = (
        "import sys\n"
        "from jamba_lm.cli.main import main\n"
        f"assert main([{command!r}, 'jamba-1.5-large', '--json']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE)},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["model"] == "jamba-1.5-large"


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_the_answer_needs_nothing_that_takes_long_to_start(command):
    """`benchmarks.start_up` has the seconds; this is what they are spent on."""
    code = """
import sys
from jamba_lm.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
names = {name.partition(".")[0] for name in sys.modules}
print(*sorted(names - set(sys.stdlib_module_names) - {"__main__"}), file=sys.stderr)
"""
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, command, "jamba-1.5-large"],
        check=True,
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(typer.__file__).parent.parent)]),
            "PATH": os.environ["PATH"],
        },
    )
    assert set(run.stderr.split()) == {"annotated_doc", "jamba_lm", "shellingham", "typer"}


# --- quantities


@given(st.integers(1, 2**59))
def test_plain_numbers_are_themselves(number):
    assert parse_bytes(str(number), "--memory") == number
    assert parse_tokens(str(number), "--context") == number


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 1024**3),
        ("80 gib", 80 * 1024**3),
        ("80GB", 80 * 10**9),
        ("1.5TiB", 3 * 1024**4 // 2),
        ("0.5KB", 500),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text, "--memory") == count


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_one_line(text):
    for parse in (parse_bytes, parse_tokens):
        try:
            assert parse(text, "--option") >= 1
        except InputError as refusal:
            assert len(str(refusal).splitlines()) == 1


@given(st.integers(0, 2**60))
def test_a_shown_size_is_near_the_real_one(count):
    number, unit = show_bytes(count).split(" ")
    power = ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert abs(float(number) * 1024**power - count) <= 0.005001 * 1024**power
