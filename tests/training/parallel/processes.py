"""Runs a function of this folder on several processes that share one start-up.

`python -m tests.training.parallel.processes MODULE WORLD FOLDER`: torch is imported once, before
the processes part, for that is what takes longest. Each leaves `FOLDER/RANK.json`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# DTensor imports this when it is first used, which every process would do for itself.
import torch._dynamo
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 600
PATIENCE = timedelta(seconds=LIMIT_SECONDS)


def run_together(module: str, world_size: int, *arguments: str) -> list[Any]:
    """Return what `module.on_process(rank, world_size, *arguments)` returned on each process.

    Processes that wait for each other forever are ended after `LIMIT_SECONDS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.training.parallel.processes"]
        run = subprocess.Popen(
            [*command, module, str(world_size), folder, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = run.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            output, _ = run.communicate()
            raise AssertionError(f"not done after {LIMIT_SECONDS} s:\n{output}") from None
        assert run.returncode == 0, output
        files = [Path(folder) / f"{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text()) for file in files]


def main() -> int:
    """Part into processes, and return how many of them failed."""
    module, world_size, folder, *arguments = sys.argv[1:]
    work = importlib.import_module(module).on_process
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    children = [
        context.Process(target=be_one, args=(work, rank, int(world_size), folder, arguments))
        for rank in range(int(world_size))
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return sum(child.exitcode != 0 for child in children)


def be_one(work: Any, rank: int, world_size: int, folder: str, arguments: list[str]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    found = work(rank, world_size, *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
