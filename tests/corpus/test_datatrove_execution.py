"""datatrove's executors carry out the same tasks: the bytes are those of this machine alone."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jamba_lm.corpus.datatrove_execution import LOGS
from jamba_lm.corpus.preparation import prepare
from jamba_lm.corpus.prepared import PreparedCorpus
from jamba_lm.errors import BackendUnavailable, RecipeError
from tests.corpus.corpora import prepared, recipe_of, sentence_text, write_jsonl
from tests.corpus.test_preparation import shard_bytes

# A cluster of one machine: jobs run at once, one after the other, as the scripts say. It is the
# scheduler that is stood in for, by the two programs that a user of one would call.
SBATCH = """\
#!{python}
import pathlib, re, subprocess, sys, os
script = sys.stdin.read() if len(sys.argv) == 1 else pathlib.Path(sys.argv[-1]).read_text()
count = re.search(r"--array=0-([0-9]+)", script)
log = pathlib.Path({log!r})
number = len(log.read_text().splitlines()) + 1 if log.exists() else 1
with log.open("a") as file:
    depends = [one for one in sys.argv if one.startswith("--dependency")]
    file.write(" ".join([str(number), *depends]) + "\\n")
if count and "launch_pickled_pipeline" in script:
    for task in range(int(count[1]) + 1):
        environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}}
        environment |= {{"SLURM_JOB_ID": str(number), "RUN_OFFSET": "0"}}
        subprocess.run(["bash", "-c", script], env=environment, check=True, stdout=2)
print("Submitted batch job", number)
"""
SRUN = """\
#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number in range(3):
        write_jsonl(
            tmp_path / f"in/{number}.jsonl", map(sentence_text, range(8 * number, 8 * number + 9))
        )
    return tmp_path


SECTIONS = {"source": [{"name": "a", "files": ["in/*"], "stages": ["pii"]}]}


def test_datatroves_local_executor_gives_the_same_bytes(texts):
    here = prepared(texts, "here", **SECTIONS, execution={"tasks": 3})
    there = prepared(
        texts, "there", **SECTIONS, execution={"executor": "datatrove-local", "tasks": 3}
    )
    assert shard_bytes(here.folder) == shard_bytes(there.folder)


@pytest.mark.slow
def test_slurm_jobs_wait_for_each_other_and_give_the_same_bytes(texts, monkeypatch):
    programs = texts / "bin"
    programs.mkdir()
    log = texts / "jobs.log"
    for name, body in (
        ("sbatch", SBATCH.format(python=sys.executable, log=str(log))),
        ("srun", SRUN),
        ("scontrol", "#!/bin/bash\necho here\n"),
    ):
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}:{bin_folder}:{os.environ['PATH']}")
    source = Path(__file__).resolve().parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", str(source))

    here = prepared(texts, "here", **SECTIONS, execution={"tasks": 2})
    execution = {
        "executor": "slurm",
        "tasks": 2,
        "options": {
            "time": "00:10:00",
            "partition": "cpu",
            "requeue_signals": [],
            "tasks_per_job": 4,
        },
    }
    recipe = recipe_of(texts, **SECTIONS, execution=execution)
    outcome = prepare(recipe, texts / "there")
    assert outcome.corpus is None
    assert not outcome.already_done
    assert shard_bytes(PreparedCorpus(texts / "there").folder) == shard_bytes(here.folder)
    waits = [line.split()[1:] for line in log.read_text().splitlines()]
    # Each phase but the first waits for the one before it.
    assert sum(any("afterok" in word for word in words) for words in waits) >= 4
    assert prepare(recipe, texts / "there").already_done


@pytest.mark.parametrize(
    ("execution", "word"),
    [
        ({"executor": "slurm", "options": {"partitoin": "cpu"}}, "did you mean 'partition'"),
        ({"executor": "slurm", "options": {"time": "1"}}, "partition"),
        ({"executor": "slurm", "options": {"tasks": 3}}, "unknown key"),
    ],
)
def test_an_option_that_the_executor_lacks_is_refused(texts, execution, word):
    with pytest.raises(RecipeError, match=word):
        prepared(texts, **SECTIONS, execution=execution)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is no dependency, and not installed")
def test_ray_gives_the_same_bytes(texts, monkeypatch):
    source = Path(__file__).resolve().parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(source), *sys.path[1:]]))
    here = prepared(texts, "here", **SECTIONS, execution={"tasks": 3})
    execution = {
        "executor": "ray",
        "tasks": 3,
        "workers": 2,
        "options": {"cpus_per_task": 1, "mem_per_cpu_gb": 1},
    }
    there = prepared(texts, "there", **SECTIONS, execution=execution)
    assert shard_bytes(here.folder) == shard_bytes(there.folder)
    assert (texts / "there" / LOGS).is_dir()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_by_name_where_it_is_missing(texts):
    with pytest.raises(BackendUnavailable, match="ray"):
        prepared(texts, **SECTIONS, execution={"executor": "ray"})
