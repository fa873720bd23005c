"""Runs of several processes for the tests: what torchrun does, from one process that is warm.

Importing torch and its distributed tensors takes seconds in each process. Here one process imports
them once, without starting a thread, and forks the ranks of every run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.running import ENVIRONMENT

SERVER = """
import json, os, resource, signal, sys
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
import jamba_lm.cli.train, jamba_lm.training.loop, jamba_lm.training.sharded_optimizer
from jamba_lm.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    order = json.loads(line)
    started = []
    for rank in range(order["count"]):
        child = os.fork()
        if child:
            started.append(child)
            continue
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["count"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]), TORCHELASTIC_RUN_ID="test",
        )
        out = os.open(f"{order['said']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1), os.dup2(out, 2)
        limit = order["largest_file"].get(str(rank))
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        status = 1
        try:
            status = main(order["arguments"])
        except SystemExit as leaving:
            status = leaving.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(json.dumps(started), flush=True)
    statuses = {}
    for child in started:
        statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([statuses[child] for child in started]), flush=True)
"""


@dataclass
class Ended:
    """How a run of several processes ended: exit statuses and output, by rank."""

    statuses: list[int]
    said: list[str]


class RankServer:
    """Starts runs of several processes."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "said"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: list[int] = []

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def begin(
        self, count: int, *arguments: Any, largest_file: dict[int, int] | None = None
    ) -> None:
        """Start a run and remember its process ids in `started`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = {
            "count": count,
            "arguments": [str(one) for one in arguments],
            "port": port,
            "said": str(self._said),
            "largest_file": largest_file or {},
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self.started = self._answer()

    def end(self) -> Ended:
        """Wait until all processes of the run have ended."""
        statuses = self._answer()
        said = [
            Path(f"{self._said}.{rank}").read_text(encoding="utf-8")
            for rank in range(len(statuses))
        ]
        return Ended(statuses, said)

    def run(self, count: int, *arguments: Any, **named: Any) -> Ended:
        self.begin(count, *arguments, **named)
        return self.end()

    def kill(self, rank: int, signal_number: int = signal.SIGKILL) -> None:
        os.kill(self.started[rank], signal_number)

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process that starts runs has died"
        return json.loads(line)


def wait_for(folder: Path, pattern: str) -> None:
    """Wait until a checkpoint is there."""
    until = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.005)
