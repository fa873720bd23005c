"""The processes that train one model together: who they are, and what they tell each other.

One process alone is the simplest case, in which everybody agrees at once. Knows neither models nor
data. What is told is numbers and text; nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from jamba_lm.errors import JambaError, ProcessError

Done = TypeVar("Done")

# How long a process waits for another one that is still connected. It must be longer than the
# slowest step, save and validation; a process that is gone is noticed at once.
PATIENCE = timedelta(minutes=30)


class FailedElsewhereError(JambaError):
    """Something failed that the first process reports, so this one need not."""


class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process.
        count: how many there are.
        device: what this process computes on.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """Describe a process; without arguments, one that is alone."""
        self.rank = rank
        self.count = count
        self.device = torch.device(device)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes the log and speaks to the console."""
        return self.rank == 0

    @property
    def spread(self) -> bool:
        """Whether a model is trained by torch.distributed's means: by several, or on a GPU."""
        return self.count > 1 or self.device.type != "cpu"

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers that every process gave, in the order of their ranks.

        Everybody gets the same bits, so decisions that are made of them are the same everywhere.

        Args:
            numbers: equally many in every process.
        """
        own = list(map(float, numbers))
        if self.count == 1:
            return [own]
        found = self._all(torch.tensor(own, dtype=torch.float64))
        return [one.tolist() for one in found]

    def add_up(self, numbers: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on its own device."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers

    def all_or_none(self, action: Callable[[], Done]) -> Done:
        """Do something that may fail in some processes; if it does, all of them end.

        Raises:
            JambaError: in the first process, what went wrong there or in the first other one.
            FailedElsewhereError: in the other processes.
        """
        if self.count == 1:
            return action()
        error = None
        try:
            done = action()
        except JambaError as caught:
            error = caught
        complaints = self._texts("" if error is None else str(error))
        failed = [(rank, text) for rank, text in enumerate(complaints) if text]
        if not failed:
            return done
        if not self.leads:
            raise FailedElsewhereError(failed[0][1])
        if error is not None:
            raise error
        rank, text = failed[0]
        raise ProcessError(f"process {rank} of {self.count}: {text}")

    def lead(self, action: Callable[[], None]) -> None:
        """Do something in the first process only, while the others wait for it.

        Raises:
            JambaError: as in `all_or_none`.
        """
        self.all_or_none(lambda: action() if self.leads else None)

    def leader_first(self, action: Callable[[], Done]) -> Done:
        """Do something in the first process and then in the others, which find what it has left.

        Raises:
            JambaError: as in `all_or_none`.
        """
        done: list[Done] = []

        def act() -> None:
            done.append(action())

        self.all_or_none(act if self.leads else lambda: None)
        self.all_or_none((lambda: None) if self.leads else act)
        return done[0]

    def _texts(self, text: str) -> list[str]:
        data = text.encode()
        lengths = [int(one[0]) for one in self.gather([len(data)])]
        if not any(lengths):
            return [""] * self.count
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[
            : len(data)
        ]
        found = self._all(padded)
        return [
            bytes(one[:length].tolist()).decode()
            for one, length in zip(found, lengths, strict=True)
        ]

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return found


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that `torchrun` has started; without it, be alone.

    Everything that torchrun tells a process by its environment is read here, by torch.
    Numbers that decide something go over gloo in any case; gradients go over NCCL where every
    process has a GPU.

    Raises:
        ProcessError: torchrun started more processes than there are GPUs, or while they were at
            work one process lost another.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes()
        return
    device, backend = "cpu", "gloo"
    if torch.cuda.is_available():
        local = dist.get_node_local_rank()
        if local >= torch.cuda.device_count():
            raise ProcessError(
                f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start as many with --nproc-per-node, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=PATIENCE)
    processes = Processes(dist.get_rank(), dist.get_world_size(), device)
    try:
        with warnings.catch_warnings():
            # FSDP warns of writing into a model's output in place, which nothing here does.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield processes
    except RuntimeError as cause:
        if not _is_lost_connection(cause):
            raise
        raise ProcessError(
            f"process {processes.rank} of {processes.count} lost the others "
            f"({' '.join(str(cause).split())[:120]}): one of them ended; what was saved last is "
            "whole, and the same command with --auto goes on from there"
        ) from cause
    # Without waiting for anyone: who fails leaves, and the others notice.
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    # gloo has no exception of its own; every message of it names its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
