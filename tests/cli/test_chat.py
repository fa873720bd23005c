"""`jamba chat` at the end of a pipe: what is typed, what is done, and Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess

import pytest

from jamba_lm.cli.chat import BLOCK, CtrlC
from jamba_lm.cli.main import main
from tests.cli.running import ENVIRONMENT, PROGRAM


@pytest.fixture
def chat(monkeypatch, capsys, tiny_chat_checkpoint):
    """Pipe lines in; return what was printed on stdout and stderr, and the exit status."""

    def chat(lines: str | bytes, *arguments: str, model=tiny_chat_checkpoint):
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        command = ["chat", str(model), "--max-tokens", "8", "--seed", "5"]
        status = main([*command, *arguments])
        return *capsys.readouterr(), status

    return chat


def answered(chat, lines: str, *arguments: str, **named) -> dict:
    out, _, status = chat(lines, "--json", *arguments, **named)
    assert status == 0
    return json.loads(out)


def test_lines_are_questions_and_answers_are_printed(chat):
    values = answered(chat, "Hello?\nAnd then?\n")
    out, err, status = chat("Hello?\nAnd then?\n")
    assert status == 0
    assert [message["role"] for message in values["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in values["messages"][::2]] == ["Hello?", "And then?"]
    for answer in values["messages"][1::2]:
        assert answer["content"] in out
    assert err.count("prompt tokens at") == 2
    assert values["has_chat_template"] is True


def test_each_turn_reads_only_what_is_new(chat):
    question = "How many boats went by?"
    answers = answered(chat, f"{question}\n" * 4)["answers"]
    read = [answer["timing"]["prompt_tokens"] for answer in answers]
    # The same question costs the same every time: its own tokens and those around it.
    assert len(set(read[1:])) == 1
    assert abs(read[1] - read[0]) < 8


def test_a_model_without_a_template_says_that_it_continues(chat, tiny_checkpoint):
    values = answered(chat, "Once upon\na time\n", model=tiny_checkpoint)
    assert values["has_chat_template"] is False
    _, err, _ = chat("Once upon\n", model=tiny_checkpoint)
    assert "no chat template: it only continues texts" in err


def test_undo_and_retry(chat):
    said_once = answered(chat, "Hello?\n")["messages"]
    assert answered(chat, "Hello?\nnever mind\n/undo\n")["messages"] == said_once
    again = answered(chat, "Hello?\n/retry\n")
    assert len(again["messages"]) == 2
    assert again["messages"][1] != said_once[1]
    assert again["answers"][1]["timing"]["prompt_tokens"] == 1
    assert answered(chat, "Hello?\n/retry\n")["messages"] == again["messages"]


def test_drafts_are_told_and_change_nothing(chat):
    lines = "boats, boats, boats, boats, boats\nAnd then?\n"
    plain = answered(chat, lines, "--dtype", "fp32")
    drafted = answered(chat, lines, "--dtype", "fp32", "--draft", "lookup")
    assert drafted["messages"] == plain["messages"]
    assert all(answer["drafting"]["calls"] <= 8 for answer in drafted["answers"])
    assert drafted["sampling"]["sources"]["seed"] == "option"


def test_a_greedy_retry_says_that_it_changes_nothing(chat):
    _, err, _ = chat("Hello?\n/retry\n", "--temperature", "0")
    assert "always the same" in err


def test_a_conversation_is_kept_and_gone_on_with(chat, tmp_path):
    folder = tmp_path / "kept"
    whole = answered(chat, f"Hello?\n/save {folder}\nAnd then?\n", "--temperature", "0")
    for rest in (
        answered(chat, f"/load {folder}\nAnd then?\n", "--temperature", "0"),
        answered(chat, "And then?\n", "--temperature", "0", "--load", str(folder)),
    ):
        assert rest["messages"] == whole["messages"]
        assert rest["answers"][0]["timing"]["prompt_tokens"] < 30


def test_a_block_is_one_message(chat):
    values = answered(chat, f"{BLOCK}\nfirst\n\nsecond {BLOCK}\n{BLOCK}one line{BLOCK}\n\n   \n")
    questions = [m["content"] for m in values["messages"] if m["role"] == "user"]
    assert questions == ["first\n\nsecond ", "one line"]


def test_a_message_may_begin_with_a_slash(chat):
    assert answered(chat, "//etc is a folder\n")["messages"][0]["content"] == "/etc is a folder"


def test_quit_and_help(chat):
    _, err, status = chat("/help\n/quit\nnever read\n")
    assert status == 0
    for name in ("/undo", "/retry", "/save", "/load", "/help", "/quit"):
        assert name in err
    assert "prompt tokens" not in err


def test_the_system_message_is_the_first(chat):
    values = answered(chat, "Hello?\n", "--system", "Be brief.")
    assert values["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/undo\n", "nothing to undo"),
        ("/retry\n", "no answer to try again"),
        ("/dance\n", "no command /dance"),
        ("/save\n", "needs a folder"),
        ("/load no/such/folder\n", "no saved conversation"),
        ("/undo twice\n", "takes nothing"),
        (b"a\xe9\n", "not UTF-8: byte 1 of it is 0xe9"),
    ],
)
def test_what_goes_wrong_in_a_pipe_ends_it_with_one_line(chat, lines, message: str):
    _, err, status = chat(lines)
    assert status == 2
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_what_goes_wrong_in_a_terminal_is_told_and_the_conversation_goes_on(
    monkeypatch, capsys, tiny_chat_checkpoint
):
    typed = iter(["/dance", "Hello?", "/quit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", str(tiny_chat_checkpoint), "--max-tokens", "4"]) == 0
    err = capsys.readouterr().err
    assert "error: no command /dance" in err
    assert "prompt tokens at" in err


def test_ctrl_c_at_an_empty_prompt_leaves_the_second_time(
    monkeypatch, capsys, tiny_chat_checkpoint
):
    def press(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", press)
    assert main(["chat", str(tiny_chat_checkpoint)]) == 130
    assert "another Ctrl-C" in capsys.readouterr().err


def test_load_and_system_exclude_each_other(chat):
    assert chat("", "--load", "x", "--system", "y")[2] == 2


def test_the_first_ctrl_c_is_noted_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_checkpoint):
    run = subprocess.Popen(
        [*PROGRAM, "chat", str(tiny_checkpoint), "--max-tokens", "1000000", "--seed", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    run.stdin.write(b"Once upon\n")
    run.stdin.flush()
    assert run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    while b"stopped by Ctrl-C" not in (line := run.stderr.readline()):
        assert line, "the program ended"
    run.stdin.write(b"/undo\n/quit\n")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert b"taken back: Once upon" in errors
    assert b"Traceback" not in errors
