"""A preparation as a whole: the same bytes however it is done, gone on with, nothing lost."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jamba_lm.corpus.columns import new_columns
from jamba_lm.corpus.plan import make_plan
from jamba_lm.corpus.preparation import prepare
from jamba_lm.corpus.prepared import PreparedCorpus
from jamba_lm.corpus.read_phase import HASH_BYTES, _Reader
from jamba_lm.errors import DataError, InputError, JambaError, RecipeError, TokenizerError
from jamba_lm.text.tokenizer import load_tokenizer
from tests.corpus.corpora import (
    prepared,
    recipe_of,
    report_of,
    sentence_text,
    stage_of,
    texts_of,
    write_jsonl,
)
from tests.text.folders import trained_folder

SOURCE = Path(__file__).resolve().parents[2] / "src"
SMALL = {"tokens": {"tokenizer": str(trained_folder("byte-level"))}}
WEB = {"name": "web", "files": ["web/*"], "stages": ["pii", "gopher_quality"], "weight": 3}
BOOKS = {"name": "books", "files": ["books/*.jsonl"]}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two sources in several files, with copies within and across them, and broken documents."""
    for number in range(4):
        first = 20 * number
        write_jsonl(tmp_path / f"web/{number}.jsonl", map(sentence_text, range(first, first + 12)))
    with (tmp_path / "web/1.jsonl").open("a") as file:
        file.write('{"text": "too short"}\nno json\n{"body": "other key"}\n')
        file.write(json.dumps({"text": sentence_text(3)}) + "\n")
    near = sentence_text(500, 400).replace("river", "RIVER", 2).replace("stone", "rock", 1)
    (tmp_path / "web/plain.txt").write_text(near + "\nwrite to jo@mail.org\n")
    write_jsonl(
        tmp_path / "books/a.jsonl",
        [*map(sentence_text, range(200, 212)), sentence_text(41), sentence_text(500, 400)],
    )
    return tmp_path


def shard_bytes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).parts[0]
        not in ("plan.json", "report.json", "report.html", "lock", "logs")
    }


def without_seconds(corpus: PreparedCorpus) -> dict[str, object]:
    report = report_of(corpus)
    del report["cpu_seconds"], report["recipe"]
    return report


def test_what_is_kept_is_tokenized_and_what_is_dropped_is_counted(texts):
    corpus = prepared(texts, source=[WEB, BOOKS], split={"validation": 0.2})
    kept = {
        side: {name: len(found) for name, found in texts_of(corpus, side).items()}
        for side in ("train", "validation")
    }
    assert stage_of(corpus, "web", "read")["dropped"] == {"not JSON": 1, "no text": 1}
    assert stage_of(corpus, "web", "gopher_quality")["dropped"] == {"short doc": 1}
    assert stage_of(corpus, "web", "pii")["counts"] == {"email": 1}
    assert stage_of(corpus, "web", "exact duplicates")["dropped"] == {"within the source": 1}
    assert stage_of(corpus, "books", "exact duplicates")["dropped"] == {"in web": 1}
    assert stage_of(corpus, "books", "near duplicates")["dropped"] == {"in web": 1}
    assert kept["train"]["web"] + kept["validation"]["web"] == 49
    assert kept["train"]["books"] + kept["validation"]["books"] == 12
    assert kept["validation"]["web"] > 0 < kept["validation"]["books"]

    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    found = {
        tokenizer.decode(ids, skip_special=True)
        for side in ("train", "validation")
        for documents in texts_of(corpus, side).values()
        for ids in documents
    }
    assert {sentence_text(number) for number in [*range(12), *range(200, 212)]} <= found
    assert all(
        ids[-1] == corpus.eos_id for documents in texts_of(corpus).values() for ids in documents
    )


def test_every_stage_hands_on_what_it_does_not_drop(texts):
    corpus = prepared(texts, source=[WEB, BOOKS])
    for source in report_of(corpus)["sources"]:
        stages = source["stages"]
        for stage in stages:
            lost = stage["documents_in"] - stage["documents_out"]
            assert lost == sum(stage["dropped"].values()), stage["stage"]
        for one, following in itertools.pairwise(stages):
            assert one["documents_out"] == following["documents_in"]
            assert one["bytes_out"] == following["bytes_in"]
        result = source["result"]
        assert stages[-1]["documents_out"] == sum(
            result[side]["documents"] for side in ("train", "validation")
        )


def test_the_bytes_do_not_depend_on_how_the_work_is_cut(texts):
    options = {
        "source": [WEB, BOOKS],
        "split": {"validation": 0.2},
        "tokens": {"shard_tokens": 1024},
    }
    one = prepared(texts, "one", **options)
    many = prepared(texts, "many", **options, execution={"tasks": 4})
    assert len(list((many.folder / "shards").iterdir())) > 6
    assert shard_bytes(one.folder) == shard_bytes(many.folder)
    assert without_seconds(one) == without_seconds(many)


def test_processes_give_the_same_bytes(texts):
    web = WEB | {"stages": ["pii", "code"]}
    options = {"source": [web, BOOKS], "split": {"validation": 0.2}}
    one = prepared(texts, "one", **options)
    two = prepared(texts, "two", **options, execution={"tasks": 3, "workers": 2})
    assert shard_bytes(one.folder) == shard_bytes(two.folder)
    assert without_seconds(one) == without_seconds(two)


def test_a_preparation_killed_at_any_moment_goes_on_to_the_same_bytes(texts):
    sections = {
        "source": [WEB | {"stages": ["pii", "code"]}, BOOKS],
        "split": {"validation": 0.2},
        "execution": {"tasks": 5},
    }
    whole = prepared(texts, "whole", **sections)
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from jamba_lm.corpus.preparation import prepare\n"
        "from jamba_lm.corpus.recipe_file import build_corpus_recipe\n"
        "folder = Path(sys.argv[1])\n"
        "recipe = build_corpus_recipe(json.loads(sys.argv[2]), folder)\n"
        "print('ready', flush=True)\n"
        "prepare(recipe, folder / 'killed')\n"
    )
    draw = random.Random(4)
    kills = 0
    while not (texts / "killed" / "corpus.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(texts), json.dumps(sections | SMALL)],
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        # Longer each time: the first fall into the beginning on a fast machine, and a slow one
        # comes to an end, too.
        try:
            process.wait(draw.uniform(0.01, 0.03) * 1.3**kills)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL), "it could not go on where it was killed"
        process.stdout.close()
        kills += 1
        assert kills < 40
    assert kills > 3
    corpus = prepared(texts, "killed", **sections)
    assert shard_bytes(whole.folder) == shard_bytes(corpus.folder)
    assert without_seconds(whole) == without_seconds(corpus)
    assert not (corpus.folder / "work").exists()


def test_what_killed_tasks_have_left_is_gone_in_the_end(texts):
    """A kill in the middle of writing a plan or a shard leaves a temporary file behind."""
    whole = prepared(texts, "whole", source=[WEB, BOOKS])
    stopped_after(texts, 6, source=[WEB, BOOKS])
    (texts / "out" / "shards").mkdir(exist_ok=True)
    for name in (".plan.json", "shards/.web-train-00000.safetensors"):
        (texts / "out" / f"{name}.0123456789abcdef.tmp").write_bytes(b"half")
    corpus = prepared(texts, "out", source=[WEB, BOOKS])
    assert shard_bytes(whole.folder) == shard_bytes(corpus.folder)


class Stopped(Exception):
    """Raised by a test in the middle of the work."""


def stopped_after(folder: Path, count: int, **sections: object) -> None:
    """Begin a preparation and stop it after so many steps of progress."""

    def watch(*_: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(recipe_of(folder, **sections), folder / "out", watch)


def test_what_was_done_is_not_done_again(texts, monkeypatch):
    sections = {"source": [WEB, BOOKS], "execution": {"tasks": 4}}
    stopped_after(texts, 4, **sections)
    done = {path.name: path.stat().st_mtime_ns for path in (texts / "out/work").glob("read-*")}
    assert 0 < len(done) < 4
    stopped_after(texts, 3, **sections)
    now = {path.name: path.stat().st_mtime_ns for path in (texts / "out/work").glob("read-*")}
    assert now.items() > done.items()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: write_jsonl(folder / "web/2.jsonl", ["another text"]), "has changed"),
        (lambda folder: os.utime(folder / "web/2.jsonl", ns=(1, 1)), "written anew"),
        (lambda folder: (folder / "web/2.jsonl").unlink(), "gone"),
        (lambda folder: write_jsonl(folder / "web/9.jsonl", ["one more"]), "new"),
    ],
    ids=["another text", "written anew", "gone", "one more"],
)
@pytest.mark.parametrize("finished", [False, True])
def test_files_that_changed_under_a_resumed_preparation_are_refused(texts, change, word, finished):
    sections = {"source": [WEB, BOOKS], "execution": {"tasks": 4}}
    if finished:
        before = shard_bytes(prepared(texts, **sections).folder)
    else:
        stopped_after(texts, 4, **sections)
        before = shard_bytes(texts / "out")
    change(texts)
    with pytest.raises(DataError, match=word):
        prepared(texts, **sections)
    assert shard_bytes(texts / "out") == before


def test_a_file_that_grows_before_its_turn_is_refused(texts):
    sections = {"source": [{"name": "a", "files": ["web/*.jsonl"]}]}

    def watch(phase: str, *_: object) -> None:
        if phase == "read":
            with (texts / "web/3.jsonl").open("a") as file:
                file.write('{"text": "added while reading"}\n')

    with pytest.raises(DataError, match=r"3\.jsonl.*has changed"):
        prepare(recipe_of(texts, **sections), texts / "out", watch)


def test_a_file_that_grows_while_it_is_read_is_refused(texts):
    class Writer:
        """A stage in the middle of the reading, which is when somebody else writes."""

        def __init__(self) -> None:
            self.counts: Counter[str] = Counter()

        def apply(self, text: str) -> str:
            with (texts / "web/3.jsonl").open("a") as file:
                file.write("\n")
            return text

    plan = make_plan(
        recipe_of(texts, source=[{"name": "a", "files": ["web/3.jsonl"], "stages": ["pii"]}])
    )
    kinds = {"text": ("|u1", 1), "ends": ("<i8", 1), "hashes": ("|u1", HASH_BYTES)}
    kinds |= {"units": ("<i4", 1), "positions": ("<i8", 1)}
    with new_columns(texts / "part", kinds) as columns:
        reader = _Reader(plan.recipe, columns, None)
        reader._stages["pii"] = Writer()
        with pytest.raises(DataError, match=r"3\.jsonl.*has changed"):
            reader.read(0, plan.units[0])


def test_a_plan_that_was_half_written_stops_nothing(texts):
    (texts / "out").mkdir()
    (texts / "out" / ".plan.json.0123456789abcdef.tmp").write_text('{"format": "jam')
    corpus = prepared(texts, source=[BOOKS])
    assert not list(corpus.folder.glob(".*.tmp"))


def test_another_recipe_is_refused_and_another_executor_is_not(texts):
    sections = {"source": [WEB, BOOKS], "execution": {"tasks": 4}}
    stopped_after(texts, 4, **sections)
    with pytest.raises(InputError, match=r"another recipe.*\[duplicates\]"):
        prepared(texts, **sections, duplicates={"near": False})
    prepared(texts, source=[WEB, BOOKS], execution={"tasks": 2})


def test_a_finished_preparation_is_left_alone(texts):
    sections = {"source": [WEB, BOOKS]}
    before = shard_bytes(prepared(texts, **sections).folder)
    outcome = prepare(recipe_of(texts, **sections), texts / "out")
    assert outcome.already_done
    assert shard_bytes(texts / "out") == before


def test_a_folder_with_something_else_in_it_is_refused(texts):
    (texts / "out").mkdir()
    (texts / "out/thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        prepared(texts, source=[WEB])
    assert [path.name for path in (texts / "out").iterdir() if path.name != "lock"] == [
        "thesis.txt"
    ]


def test_two_preparations_do_not_share_a_folder(texts):
    sections = {"source": [WEB]}

    def watch(*_: object) -> None:
        prepare(recipe_of(texts, **sections), texts / "out")

    with pytest.raises(InputError, match="another process"):
        prepare(recipe_of(texts, **sections), texts / "out", watch)


def test_a_full_disk_is_reported_and_loses_nothing(texts):
    """A limit on the size of a file stands in for the disk: the system refuses the same writes."""
    sections = {"source": [WEB, BOOKS], "execution": {"tasks": 4}}
    whole = shard_bytes(prepared(texts, "whole", **sections).folder)
    stopped_after(texts, 2, **sections)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2000, 9000, 30000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=r"cannot write.*File too large"):
                prepared(texts, **sections)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list((texts / "out").rglob("*.tmp"))
    assert shard_bytes(prepared(texts, **sections).folder) == whole


def test_little_text_still_has_two_sides(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [sentence_text(1), sentence_text(2)])
    corpus = prepared(
        tmp_path, source=[{"name": "a", "files": ["a.jsonl"]}], split={"validation": 0.001}
    )
    assert [len(texts_of(corpus, side)["a"]) for side in ("train", "validation")] == [1, 1]


def test_one_document_cannot_be_split_and_says_what_to_do(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [sentence_text(1)])
    source = {"name": "a", "files": ["a.jsonl"]}
    with pytest.raises(DataError, match=r"separator.*split\.validation = 0"):
        prepared(tmp_path, source=[source])
    corpus = prepared(tmp_path, "out2", source=[source], split={"validation": 0})
    assert len(texts_of(corpus)["a"]) == 1


def test_a_document_stays_on_its_side_when_others_are_added(texts):
    small = prepared(texts, "small", source=[BOOKS], split={"validation": 0.3})
    large = prepared(texts, "large", source=[BOOKS, WEB], split={"validation": 0.3})
    one, other = (
        {tuple(ids) for ids in texts_of(corpus, "validation")["books"]} for corpus in (small, large)
    )
    assert one == other
    assert one


@pytest.mark.parametrize(
    ("sections", "error", "word"),
    [
        ({"source": [{"name": "a", "files": ["nothing/*.txt"]}]}, DataError, "no file at"),
        (
            {"source": [{"name": "a", "files": ["web/0.jsonl"], "field": "body"}]},
            DataError,
            "no text",
        ),
        ({"source": [WEB], "tokens": {"tokenizer": "missing"}}, DataError, "tokenizer"),
        ({"source": [WEB], "tokens": {"tokenizer": "web"}}, TokenizerError, "tokenizer"),
        ({"source": [WEB], "gopher_quality": {"min_words": 3}}, RecipeError, "min_doc_words"),
        (
            {"source": [WEB], "gopher_quality": {"min_doc_words": "3"}},
            RecipeError,
            "like its default",
        ),
        ({"source": [WEB], "documents": {"unusable": "stop"}}, DataError, r"1\.jsonl:14.*not JSON"),
    ],
)
def test_what_cannot_work_is_said_with_its_remedy(texts, sections, error, word):
    with pytest.raises(error, match=word):
        prepared(texts, **sections)


def test_preparing_needs_no_torch():
    """Its processes start in a fraction of the time that torch takes."""
    code = (
        "import sys, jamba_lm.corpus.preparation, jamba_lm.cli.data\n"
        "sys.exit(', '.join({'torch', 'datatrove', 'pyarrow', 'ftfy'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_errors_are_ours(texts):
    """A folder in the place of a file, and other things that are no documents."""
    (texts / "web/folder.jsonl").mkdir()
    (texts / "web/empty.txt").write_text("")
    (texts / "web/picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    os.mkfifo(texts / "web/pipe.txt")
    corpus = prepared(texts, source=[WEB])
    dropped = stage_of(corpus, "web", "read")["dropped"]
    assert dropped["empty"] == 1
    assert dropped["binary"] == 1
    with pytest.raises(JambaError):
        prepared(texts, "other", source=[{"name": "a", "files": ["web/pipe.txt"]}])
