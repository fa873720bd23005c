"""Several processes compute what one does: the loss and the gradient of every parameter."""

from __future__ import annotations

import pytest

from tests.tolerances import PARALLEL
from tests.training.parallel.processes import run_together


def assert_as_one_process(world_size: int) -> None:
    found = run_together("tests.training.parallel.cases", world_size)
    wrong = []
    for case in found[0]:
        for rank, one in enumerate(found):
            assert len(one[case]["errors"]) > 40
            wrong += [
                f"{case}: {name} on process {rank} differs by {error:.1e} of its scale"
                for name, error in one[case]["errors"].items()
                if not error <= PARALLEL["gradient"]
            ]
            if not one[case]["whole values come back"]:
                wrong.append(f"{case}: process {rank} gets other whole values back")
    assert not wrong, "\n".join(wrong)


def test_two_processes_compute_what_one_does():
    """In one group of processes, for starting them takes longer than any case."""
    assert_as_one_process(2)


@pytest.mark.distributed
def test_four_processes_compute_what_one_does():
    assert_as_one_process(4)
