"""What becomes of errors, pipes and Ctrl-C; and that asking for help is quick."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from jamba_lm import __version__
from jamba_lm.cli import main as command_line
from jamba_lm.cli.main import main
from jamba_lm.cli.output import Output
from jamba_lm.errors import InputError, JambaError
from tests.cli.running import ENVIRONMENT, PROGRAM

COMMANDS = (
    "inspect",
    "plan",
    "doctor",
    "init",
    "tokenizer",
    "generate",
    "chat",
    "score",
    "bench",
    "train",
)


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_says_what_each_option_means(capsys, name: str):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: jamba {name}")
    command = command_line.typer.main.get_command(command_line.app).commands[name]
    for one in getattr(command, "commands", {"": command}).values():
        for parameter in one.params:
            assert parameter.help, f"{one.name}: {parameter.opts} is not explained"
            assert parameter.help.endswith("."), parameter.help


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jamba {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["plan", "--no-such-option"],
        ["plan"],
        ["bench", "model", "--batch", "many"],
        ["generate", "model", "--seed"],
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(capsys, arguments):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(command_line, "_print_version", fail)
    # typer holds the function itself, so the failure is put where every command begins.
    monkeypatch.setattr(command_line.typer.main, "get_command", fail)


@pytest.mark.parametrize("error", [JambaError("first line\nsecond"), InputError("a  b\n")])
def test_an_error_of_ours_is_one_line_and_status_2(capsys, monkeypatch, error):
    fail_with(error, monkeypatch)
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "error: " + " ".join(str(error).split()) + "\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    fail_with(ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_ctrl_c_is_status_130(capsys, monkeypatch):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["plan"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["generate", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from jamba_lm.cli.main import main\n"
        f"main({arguments})\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'rich', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_reader_who_leaves_is_no_error():
    """`jamba plan ... | head -0`: the other end of the pipe is closed before anything is read."""
    run = subprocess.Popen(
        [*PROGRAM, "plan", "jamba-v0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait(timeout=60) == 141
    assert errors == b""
    run.stderr.close()


def test_ctrl_c_while_a_command_works_ends_it_without_a_traceback(tiny_checkpoint):
    run = subprocess.Popen(
        [*PROGRAM, "bench", str(tiny_checkpoint), "--repeats", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    # The layers are printed when the model is loaded.
    assert run.stderr.readline()
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert out == b""
    assert b"Traceback" not in errors


def test_a_character_that_the_terminal_lacks_is_escaped():
    code = (
        "from jamba_lm.cli.main import main; import sys; sys.exit(main(['generate', 'kätzchen']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        input=b"text",
        check=False,
    )
    assert run.returncode == 2
    assert b"k\\xe4tzchen" in run.stderr


def test_results_are_on_stdout_and_notes_on_stderr(capsys):
    output = Output()
    output.write("part")
    output.end_line()
    output.end_line()
    output.line("whole")
    output.note("beside")
    output.result({"a": 1})
    assert capsys.readouterr() == ("part\nwhole\n", "beside\n")


def test_under_json_stdout_has_one_object_and_nothing_else(capsys):
    output = Output(json_wanted=True)
    output.line("for a person")
    output.note("beside")
    output.result({"text": "Mädchen", "number": 1.5})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"text": "Mädchen", "number": 1.5}
    assert printed.err == "for a person\nbeside\n"


def test_a_result_that_is_no_json_is_a_bug(capsys):
    with pytest.raises(ValueError, match="JSON"):
        Output(json_wanted=True).result({"number": float("nan")})
    assert capsys.readouterr().out == ""
