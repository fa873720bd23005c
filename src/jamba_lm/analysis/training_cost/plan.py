"""A training run on a mesh, planned: whether it fits, how fast it is, and which mesh is best.

Needs no torch. Knows no command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from jamba_lm.analysis.memory import GIB
from jamba_lm.analysis.training_cost.activations import Activations
from jamba_lm.analysis.training_cost.devices import Assumption
from jamba_lm.analysis.training_cost.mesh import check_mesh, describe
from jamba_lm.analysis.training_cost.operations import Flops
from jamba_lm.analysis.training_cost.rank import Pass, Rank
from jamba_lm.analysis.training_cost.rank_memory import RankMemory, rank_memory
from jamba_lm.analysis.training_cost.step import (
    Machine,
    StepTime,
    flops_per_token,
    step_time,
)
from jamba_lm.config import JambaConfig
from jamba_lm.errors import CapacityError, InputError
from jamba_lm.parallel_layout import ParallelLayout

SECONDS_PER_DAY = 86_400.0
# No tensor group leaves a node, and sequences are cut for `context` only so far.
SMALLEST_CONTEXT_PIECE = 1024


class PlannedDevice(Machine, Protocol):
    """A device as a plan asks it, and what its speeds rest on."""

    @property
    def largest_pass(self) -> int:
        """Tokens in one pass, beyond which nothing is gained by more."""

    @property
    def node_size(self) -> int:
        """Devices with fast links among each other."""

    @property
    def others_share(self) -> float:
        """Share of the time that nothing accounts for."""

    @property
    def reserve_bytes(self) -> int:
        """Bytes of memory that training cannot use."""

    def assumptions(self) -> Iterator[tuple[str, Assumption]]:
        """Yield every number with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is to be trained, and on what.

    Attributes:
        gpus: devices in all.
        gpu_memory: bytes of each.
        tokens: of the whole run.
        batch_tokens: of one optimizer step.
        sequence_tokens: of each sequence.
    """

    config: JambaConfig
    device: PlannedDevice
    gpus: int
    gpu_memory: int
    tokens: int
    batch_tokens: int
    sequence_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """One way to carry out a run.

    Attributes:
        rank: the rank with the most work and memory.
        memory: on it, in bytes.
        activations: what `memory` counts as such, in detail.
        time: of a step.
        run: what was asked.
    """

    rank: Rank
    memory: RankMemory
    activations: Activations
    time: StepTime
    run: Run

    @property
    def fits(self) -> bool:
        """Whether it fits into the memory of a device."""
        return self.memory.total <= self.run.gpu_memory

    @property
    def days(self) -> float:
        """Days for all tokens of the run."""
        return self.run.tokens / self.time.tokens_per_second / SECONDS_PER_DAY

    @property
    def model_flops(self) -> float:
        """Of the products with weights, forward and backward, of one token."""
        parts = token_flops(self.run)
        return sum(
            flops.needed
            for part, flops in parts.items()
            if part not in ("attention", "scan", "convolution")
        )

    @property
    def mfu(self) -> float:
        """Their share of the devices' peak, as a training run logs it."""
        rate = self.model_flops * self.time.tokens_per_second
        return rate / (self.run.gpus * self.run.device.peak_flops)


def token_flops(run: Run) -> dict[str, Flops]:
    """Return the arithmetic of one token, by part."""
    # In float32 no rows are filled up, which nobody needs.
    work = Pass(sequences=1, tokens=run.sequence_tokens, width=4)
    return flops_per_token(Rank(run.config, ParallelLayout(), work))


def passes_of(rank: Rank, run: Run) -> int:
    """Return how many passes a rank, or each of its workers, makes in a step, in sequence."""
    together = rank.mesh.num_readers * rank.work.sequences * run.device.workers
    return run.batch_tokens // (together * run.sequence_tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to carry out a run, before anybody has timed it.

    Attributes:
        rank: the rank with the most work and memory.
        memory: on it.
        activations: what `memory` counts as such.
    """

    rank: Rank
    memory: RankMemory
    activations: Activations

    def timed(self, run: Run) -> TrainingPlan:
        """Predict how fast it is."""
        passes = passes_of(self.rank, run)
        time = step_time(self.rank, run.device, passes, run.device.others_share)
        return TrainingPlan(
            rank=self.rank, memory=self.memory, activations=self.activations, time=time, run=run
        )


def candidate(run: Run, mesh: ParallelLayout, *, sequences: int, recompute: bool) -> Candidate:
    """Add up the memory of a run on one mesh.

    Args:
        run: what is asked.
        mesh: of `run.gpus` ranks, checked.
        sequences: that one rank reads in a pass.
        recompute: layers are computed again in the backward pass.
    """
    work = Pass(sequences=sequences, tokens=run.sequence_tokens, recompute=recompute)
    rank = Rank(run.config, mesh, work)
    passes = passes_of(rank, run)
    device = run.device
    return Candidate(rank, *rank_memory(rank, passes, device.reserve_bytes, device.workers))


def check_run(run: Run) -> None:
    """Refuse a run whose numbers contradict each other.

    Raises:
        InputError: the batch is not whole sequences, or larger than the run.
    """
    if run.batch_tokens % run.sequence_tokens:
        raise InputError(
            f"a batch of {run.batch_tokens:,} tokens is not a whole number of sequences of "
            f"{run.sequence_tokens:,}: take "
            f"{max(1, run.batch_tokens // run.sequence_tokens) * run.sequence_tokens:,}"
        )
    if run.batch_tokens > run.tokens:
        raise InputError(
            f"a batch has {run.batch_tokens:,} tokens and the whole run {run.tokens:,}: "
            "expected a batch of at most that"
        )


def best_on(run: Run, mesh: ParallelLayout) -> TrainingPlan:
    """Return the fastest plan on one mesh, over how much goes through at a time.

    Raises:
        InputError: the mesh does not divide the shape, the devices or the batch.
        CapacityError: nothing fits; the message says what is missing, and what would do.
    """
    check_run(run)
    if mesh.world_size != run.gpus:
        raise InputError(
            f"--mesh {describe(mesh)} has {mesh.world_size:,} ranks (replicate x shard x context x "
            f"tensor) and --gpus is {run.gpus:,}: make them equal"
        )
    check_mesh(mesh, run.config, run.sequence_tokens)
    workers = run.device.workers
    readers = mesh.num_readers * workers
    if (run.batch_tokens // run.sequence_tokens) % readers:
        whole = readers * run.sequence_tokens
        who = f"{readers:,} readers (replicate x shard)" if workers == 1 else f"{readers} workers"
        raise InputError(
            f"a batch of {run.batch_tokens:,} tokens is {run.batch_tokens // run.sequence_tokens:,}"
            f" sequences, which {who} cannot share out: "
            f"take a batch of {-(-run.batch_tokens // whole) * whole:,}"
        )
    best, least = _fastest(run, [mesh])
    assert least is not None
    if best is None:
        raise CapacityError(
            f"does not fit: the smallest plan on {describe(mesh)} takes "
            f"{least.memory.total / GIB:.1f} GiB of {run.gpu_memory / GIB:.1f} GiB on a rank, "
            f"{_largest_part(least.memory)}; {_what_would_fit(run)}"
        )
    return best


def _fastest(
    run: Run, meshes: Iterable[ParallelLayout]
) -> tuple[TrainingPlan | None, Candidate | None]:
    """Return the fastest plan that fits, and the candidate that takes the least memory."""
    best: TrainingPlan | None = None
    least: Candidate | None = None
    for mesh in meshes:
        for found in _candidates(run, mesh):
            if least is None or found.memory.total < least.memory.total:
                least = found
            if found.memory.total <= run.gpu_memory:
                plan = found.timed(run)
                if best is None or plan.time.seconds < best.time.seconds:
                    best = plan
    return best, least


def _candidates(run: Run, mesh: ParallelLayout) -> Iterator[Candidate]:
    each = run.batch_tokens // run.sequence_tokens // (mesh.num_readers * run.device.workers)
    for recompute in (False, True):
        sequences = 1
        # `context` cuts the rows of a pass, not each sequence: with two of them it cuts nothing.
        most = 1 if mesh.context > 1 else each
        while sequences <= most and (
            sequences == 1 or sequences * run.sequence_tokens <= run.device.largest_pass
        ):
            found = candidate(run, mesh, sequences=sequences, recompute=recompute)
            if each % sequences == 0:
                yield found
            if found.memory.total > run.gpu_memory:
                # More sequences at a time take more.
                break
            sequences *= 2


def _largest_part(memory: RankMemory) -> str:
    name = max(memory.__slots__, key=lambda one: getattr(memory, one))
    return f"most of it {name} ({getattr(memory, name) / GIB:.1f} GiB)"


def _what_would_fit(run: Run) -> str:
    """Say which other mesh of as many devices fits, or what to change."""
    try:
        return f"--mesh {describe(search(run).rank.mesh)} would"
    except CapacityError:
        return "no mesh of so many devices would: take more of them, or shorter sequences"


def search(run: Run) -> TrainingPlan:
    """Return the fastest plan that fits, over all meshes of `run.gpus` ranks worth trying.

    `tensor` stays within a node; every other axis takes every number that divides.

    Raises:
        InputError: the batch cannot be shared out among so many devices.
        CapacityError: none fits.
    """
    check_run(run)
    best, least = _fastest(run, _meshes(run))
    if least is None:
        raise InputError(
            f"a batch of {run.batch_tokens:,} tokens in sequences of {run.sequence_tokens:,} "
            f"cannot be shared out among {run.gpus:,} devices: take a larger --batch-tokens, or a "
            "number of devices that divides"
        )
    if best is None:
        raise CapacityError(
            f"does not fit on {run.gpus:,} devices of {run.gpu_memory / GIB:.1f} GiB: the smallest "
            f"plan, --mesh {describe(least.rank.mesh)}, takes "
            f"{least.memory.total / GIB:.1f} GiB on a rank, {_largest_part(least.memory)}; take "
            "more devices, more memory or shorter sequences"
        )
    return best


def _meshes(run: Run) -> Iterator[ParallelLayout]:
    node = run.device.node_size
    batch = run.batch_tokens // run.sequence_tokens
    for tensor in _divisors(run.gpus):
        if tensor > node:
            break
        for context in _divisors(run.gpus // tensor):
            if context > 1 and run.sequence_tokens // context < SMALLEST_CONTEXT_PIECE:
                break
            readers = run.gpus // tensor // context
            if batch % readers:
                continue
            for shard in _divisors(readers):
                for expert in _divisors(run.config.num_experts):
                    mesh = ParallelLayout(
                        replicate=readers // shard,
                        shard=shard,
                        context=context,
                        tensor=tensor,
                        expert=expert,
                        sequence=tensor > 1,
                    )
                    if _possible(mesh, run):
                        yield mesh


def _possible(mesh: ParallelLayout, run: Run) -> bool:
    try:
        check_mesh(mesh, run.config, run.sequence_tokens)
    except InputError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
