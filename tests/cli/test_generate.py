"""`jamba generate` continues a text: what it prints where, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from jamba_lm.cli.main import main
from jamba_lm.generation import generate
from jamba_lm.language_model import load
from jamba_lm.model.layout import draw_layers
from jamba_lm.stepper import Stepper
from jamba_lm.text.tokenizer import load_tokenizer
from tests.arms import shaken_model
from tests.cli.running import ENVIRONMENT, PROGRAM
from tests.tiny_checkpoint import TINY_TEXT, tiny_config, write_json, write_tiny_checkpoint

PROMPT = "Once upon a time"


@pytest.fixture
def pipe_in(monkeypatch):
    def pipe(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return pipe


@pytest.fixture
def run(capsys, tiny_checkpoint):
    def run(*arguments: str) -> tuple[str, str]:
        command = ["generate", str(tiny_checkpoint), "--seed", "3", "--max-tokens", "20"]
        assert main([*command, *arguments]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys, tiny_checkpoint):
    def refused(*arguments: str) -> str:
        assert main(["generate", str(tiny_checkpoint), *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return refused


def test_stdout_is_the_text_and_stderr_the_layers_and_the_timings(run, tiny_checkpoint):
    out, err = run("--prompt", PROMPT, "--temperature", "0")
    model, tokenizer = load(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    tokens = generate(
        model,
        tokenizer.encode(PROMPT),
        max_new_tokens=20,
        tokenizer=tokenizer,
        stop_ids=tokenizer.eos_ids,
    )
    assert out.rstrip("\n") == "".join(token.text for token in tokens).rstrip("\n")
    layers, timing = err.splitlines()
    assert layers == draw_layers(tiny_config())
    for part in ("prompt tokens at", "first token after", "20 new tokens at", "seed 3"):
        assert part in timing


def test_json_is_one_object_and_everything_else_is_on_stderr(run):
    text, _ = run("--prompt", PROMPT)
    out, err = run("--prompt", PROMPT, "--json")
    values = json.loads(out)
    assert values["text"].rstrip("\n") == text.rstrip("\n")
    assert values["text"] in err
    assert values["finish_reason"] == "length"
    assert values["seed"] == 3
    assert values["layers"] == draw_layers(tiny_config())
    assert values["timing"]["new_tokens"] == len(values["ids"]) == 20
    assert values["timing"]["prompt_tokens"] == len(values["prompt_ids"])
    assert "logprobs" not in values


def test_log_probabilities_are_told_for_every_token(run):
    values = json.loads(run("--prompt", PROMPT, "--json", "--logprobs", "3")[0])
    assert [one["id"] for one in values["logprobs"]] == values["ids"]
    for one in values["logprobs"]:
        best = [top["logprob"] for top in one["top"]]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert one["logprob"] <= best[0] < 0


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(run, pipe_in, tmp_path):
    expected, _ = run("--prompt", PROMPT)
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert run("--prompt-file", str(tmp_path / "prompt.txt"))[0] == expected
    pipe_in(PROMPT.encode() + b"\r\n")
    assert run()[0] == expected


def test_only_one_line_break_is_taken_off_a_file(run, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n\n")
    values = json.loads(run("--prompt-file", str(tmp_path / "prompt.txt"), "--json")[0])
    assert values["prompt"] == PROMPT + "\n"


def test_an_empty_prompt_starts_from_the_bos(run, pipe_in):
    values = json.loads(run("--prompt", "", "--json")[0])
    assert values["prompt_ids"] == [1]
    pipe_in(b"")
    assert json.loads(run("--json")[0])["ids"] == values["ids"]


def test_a_tokenizer_that_adds_no_bos_still_starts_an_empty_prompt_from_it(tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": False})
    assert main(["generate", str(folder), "--prompt", "", "--json", "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [1]


def test_the_prompt_is_echoed_when_asked_for(run):
    text, _ = run("--prompt", PROMPT)
    assert run("--prompt", PROMPT, "--echo")[0] == PROMPT + text


def test_a_stop_string_is_not_printed(run):
    text, _ = run("--prompt", PROMPT)
    stop = text[3:5]
    values = json.loads(run("--prompt", PROMPT, "--json", "--stop", stop)[0])
    assert values["text"] == text[: text.find(stop)]
    assert values["finish_reason"] == "stop_string"


def test_without_a_seed_a_fresh_one_is_told_and_gives_the_text_again(capsys, tiny_checkpoint):
    command = ["generate", str(tiny_checkpoint), "--prompt", PROMPT, "--json"]
    assert main([*command, "--max-tokens", "12"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*command, "--max-tokens", "12", "--seed", str(first["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == first["ids"]


def test_options_reach_the_model(run):
    values = json.loads(
        run(
            *("--prompt", PROMPT, "--json", "--dtype", "bf16", "--backend", "reference"),
            *("--threads", "1", "--prefill-tokens", "2"),
        )[0]
    )
    assert len(values["ids"]) == 20


def test_a_long_prompt_is_read_in_pieces(run, tmp_path, monkeypatch):
    rows: list[int] = []
    read = Stepper.read

    def counted(self, sequences, *arguments):
        rows.append(sum(len(ids) for ids in sequences))
        return read(self, sequences, *arguments)

    monkeypatch.setattr(Stepper, "read", counted)
    (tmp_path / "long.txt").write_text(TINY_TEXT * 20)
    values = json.loads(run("--prompt-file", str(tmp_path / "long.txt"), "--json")[0])
    assert values["timing"]["prompt_tokens"] > 1000
    assert max(rows) == 512
    assert sum(rows) == values["timing"]["prompt_tokens"] + 19


def test_a_prompt_of_a_megabyte_is_read(capsys, tmp_path):
    """One Mamba layer: attention would take a minute over so many tokens."""
    folder = write_tiny_checkpoint(tmp_path / "model")
    only_mamba = tiny_config().replace(
        d_model=16, num_layers=1, attention_period=2, attention_offset=1, num_experts=1
    )
    shaken_model(only_mamba).save(tmp_path / "mamba")
    copy_tokenizer(folder, tmp_path / "mamba")
    text = (TINY_TEXT * (1 + 2**20 // len(TINY_TEXT.encode()))).encode()[: 2**20]
    (tmp_path / "long.txt").write_bytes(text.decode(errors="ignore").encode())
    command = ["generate", str(tmp_path / "mamba"), "--prompt-file", str(tmp_path / "long.txt")]
    assert main([*command, "--max-tokens", "3", "--prefill-tokens", "4096", "--json"]) == 0
    timing = json.loads(capsys.readouterr().out)["timing"]
    assert timing["prompt_tokens"] > 100_000
    assert timing["new_tokens"] == 3


# Drafts, chats and the checkpoint's own settings -----------------------------------------------


def test_drafts_change_the_counts_and_not_the_text(run):
    prompt = ("--prompt", PROMPT * 4, "--dtype", "fp32", "--json")
    plain = json.loads(run(*prompt)[0])
    out, err = run(*prompt, "--draft", "lookup")
    values = json.loads(out)
    assert values["ids"] == plain["ids"]
    assert "drafting" not in plain
    counts = values["drafting"]
    assert counts["accepted"] <= counts["proposed"]
    assert counts["calls"] + counts["accepted"] == 20
    assert f"of {counts['proposed']} drafted tokens accepted in {counts['calls']} calls" in err


def test_a_chat_prompt_is_a_message_of_the_user(capsys, tiny_chat_checkpoint):
    command = ["generate", str(tiny_chat_checkpoint), "--max-tokens", "3", "--json", "--chat"]
    tokenizer = load_tokenizer(tiny_chat_checkpoint)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages = [*system, {"role": "user", "content": PROMPT}]
        more = ["--system", "Be brief."] if system else []
        assert main([*command, "--prompt", PROMPT, *more]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["prompt_ids"] == tokenizer.chat_ids(messages)
        assert values["messages"] == messages
        assert values["prompt"] == PROMPT


def sampling_of(run, *arguments: str) -> dict:
    return json.loads(run("--prompt", PROMPT, "--json", *arguments)[0])["sampling"]


def test_without_settings_the_defaults_are_used_and_named(run):
    found = sampling_of(run, "--top-k", "7")
    assert found["temperature"] == 0.8
    assert found["top_p"] == 0.95
    assert found["sources"]["temperature"] == "default"
    assert found["top_k"] == 7
    assert found["sources"]["top_k"] == "option"


@pytest.fixture
def run_with(capsys, tmp_path, tiny_checkpoint):
    """Run a checkpoint whose generation_config.json says something more."""

    def run_with(stated: dict, *arguments: str) -> dict:
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(tiny_checkpoint, folder)
        write_json(folder / "generation_config.json", stated)
        command = ["generate", str(folder), "--prompt", PROMPT, "--max-tokens", "2", "--json"]
        assert main([*command, *arguments]) == 0
        return json.loads(capsys.readouterr().out)["sampling"]

    return run_with


def test_the_checkpoint_s_settings_are_used_where_no_option_is_given(run_with):
    stated = {"do_sample": True, "temperature": 0.4, "top_k": 30, "repetition_penalty": 1.1}
    found = run_with(stated, "--temperature", "0.6")
    assert (found["temperature"], found["sources"]["temperature"]) == (0.6, "option")
    assert (found["top_k"], found["sources"]["top_k"]) == (30, "generation_config.json")
    assert found["repetition_penalty"] == 1.1
    assert (found["top_p"], found["sources"]["top_p"]) == (0.95, "default")


def test_a_checkpoint_may_ask_for_no_draws_and_an_option_overrules_it(run_with):
    found = run_with({"do_sample": False, "temperature": 0.4})
    assert (found["temperature"], found["sources"]["temperature"]) == (0, "generation_config.json")
    assert run_with({"do_sample": False}, "--temperature", "0.5")["temperature"] == 0.5
    # An option that only means something with draws asks for them.
    assert run_with({"do_sample": False}, "--top-p", "0.5")["temperature"] == 0.8
    assert run_with({"do_sample": False}, "--presence-penalty", "1")["temperature"] == 0


def test_a_setting_out_of_range_is_the_checkpoint_s_mistake(capsys, tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    write_json(tmp_path / "model" / "generation_config.json", {"top_p": 7})
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "generation_config.json': top_p is 7: expected" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "choose one"),
        (["--prompt-file", "no/such/file"], "No such file"),
        (["--prompt", "a\udcffb"], "--prompt is not UTF-8: byte 1 is 0xff"),
        (["--prompt", "a", "--logprobs", "2"], "needs --json"),
        (["--prompt", "a", "--max-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--prefill-tokens", "0"], "prefill_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-p", "nan"], "top_p is nan"),
        (["--prompt", "a", "--top-k", "0"], "top_k is 0"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--stop", ""], "stop string ''"),
        (["--prompt", "a", "--threads", "0"], "--threads is 0"),
        (["--prompt", "a", "--draft", "oracle"], "draft is 'oracle': expected lookup"),
        (["--prompt", "a", "--system", "Be brief."], "--system needs --chat"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--dtype", "fp3"], "fp3"),
        (["--prompt", "a", "--backend", "abacus"], "abacus"),
    ],
    ids=lambda value: (
        " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else ""
    ),
)
def test_what_cannot_be_used_is_refused_in_one_line(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("data", [b"\xff\xfe", "Mädchen".encode("latin-1"), b"ab\xf0\x9f"])
def test_a_prompt_that_is_not_utf8_is_refused(refused, pipe_in, tmp_path, data: bytes):
    (tmp_path / "prompt").write_bytes(data)
    assert "not UTF-8: byte" in refused("--prompt-file", str(tmp_path / "prompt"))
    pipe_in(data)
    assert "standard input is not UTF-8: byte" in refused()


def test_a_terminal_is_not_waited_for(refused, monkeypatch, pipe_in):
    pipe_in(b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "--prompt" in refused()


@pytest.mark.parametrize("model", ["no/such/model", "jamba-v0.1"])
@pytest.mark.parametrize("command", ["generate", "chat", "bench", "score"])
def test_a_model_that_is_not_there_is_refused(capsys, tmp_path, command: str, model: str):
    (tmp_path / "text").write_text("a")
    file = {"score": [str(tmp_path / "text")], "generate": ["--prompt", "a"]}.get(command, [])
    assert main([command, model, *file]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no model at '{model}': expected a checkpoint folder")
    assert error.count("\n") == 1


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


def test_an_id_that_the_model_lacks_is_refused(capsys, tmp_path, tiny_checkpoint):
    """A tokenizer with more tokens than the model has rows for."""
    shaken_model(tiny_config().replace(vocab_size=300)).save(tmp_path / "small")
    copy_tokenizer(tiny_checkpoint, tmp_path / "small")
    assert main(["generate", str(tmp_path / "small"), "--prompt", TINY_TEXT]) == 2
    assert "out of range: expected 0..299" in capsys.readouterr().err


def test_logits_that_are_no_numbers_are_told(capsys, tmp_path, tiny_checkpoint):
    broken = shaken_model(tiny_config())
    with torch.no_grad():
        broken.decoder.final_norm.weight.fill_(math.nan)
    broken.save(tmp_path / "broken")
    copy_tokenizer(tiny_checkpoint, tmp_path / "broken")
    assert main(["generate", str(tmp_path / "broken"), "--prompt", "a"]) == 2
    assert "not numbers" in capsys.readouterr().err


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )


# What was said becomes likelier each time, so that the text goes round and does not end by itself;
# with the seed it is known that it does not end before.
ENDLESS = (
    *("--prompt", PROMPT, "--max-tokens", "1000000"),
    *("--frequency-penalty", "-2", "--seed", "1"),
)


def test_ctrl_c_keeps_what_was_written(tiny_checkpoint):
    run = start("generate", str(tiny_checkpoint), *ENDLESS)
    first = run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert b"new tokens at" in errors
    assert b"Traceback" not in errors


def test_ctrl_c_under_json_still_gives_the_object(tiny_checkpoint):
    run = start("generate", str(tiny_checkpoint), *ENDLESS, "--json", "--temperature", "2")
    run.stderr.readline()
    assert run.stderr.read(30)
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    values = json.loads(out)
    assert run.returncode == 130
    assert values["finish_reason"] == "interrupted"
    assert len(values["ids"]) > 0


def test_a_reader_who_leaves_ends_it_quietly(tiny_checkpoint):
    run = start("generate", str(tiny_checkpoint), *ENDLESS)
    run.stdout.read(5)
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait(timeout=60) == 141
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors
    run.stderr.close()
