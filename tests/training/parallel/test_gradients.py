"""Several processes compute what one does: the loss and the gradient of every parameter."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jamba_lm.training.parallel.row_cut import RowCut
from jamba_lm.training.parallel.traffic import pass_values
from tests.tolerances import PARALLEL
from tests.training.parallel.cases import CASES, CONFIGS, Case
from tests.training.parallel.processes import run_together


def assert_as_one_process(world_size: int) -> None:
    found = run_together("tests.training.parallel.cases", world_size)
    wrong: list[str] = []
    for name, case in CASES[world_size].items():
        # Not with layers that run again, nor with FSDP, whose collectives are its own.
        if not (case.more or case.wrap):
            wrong += traffic_errors(name, case, [one[name]["said"] for one in found])
    for case in found[0]:
        for rank, one in enumerate(found):
            assert len(one[case]["errors"]) > 40
            wrong += [
                f"{case}: {name} on process {rank} differs by {error:.1e} of its scale"
                for name, error in one[case]["errors"].items()
                if not error <= PARALLEL["gradient"]
            ]
            if not one[case]["same values"]:
                wrong.append(f"{case}: process {rank} gives other values back")
    assert not wrong, "\n".join(wrong)


def traffic_errors(name: str, case: Case, said: list[dict[str, int]]) -> list[str]:
    """Compare what all processes said with what is reckoned of their rows."""
    layout, config = case.layout, CONFIGS[case.config]
    reckoned = dict.fromkeys(said[0], 0)
    for rank in range(layout.world_size):
        places, lengths = layout.coordinates(rank), case.lengths[layout.reader(rank)]
        cut = RowCut.of(lengths, layout.context, places["context"])
        rows = cut.end - cut.first
        one = pass_values(config, layout, rows=rows, cut=cut.crosses)
        # What is passed along the context is as much as the longest part's.
        one["context"] = pass_values(config, layout, rows=cut.longest, cut=cut.crosses)["context"]
        for axis, values in one.items():
            reckoned[axis] += values
    found = {axis: sum(one[axis] for one in said) for axis in reckoned}
    if layout.sequence and any(
        (end - first) % layout.tensor
        for lengths in case.lengths[: layout.num_readers]
        for cut in [RowCut.of(lengths, layout.context, 0)]
        for first, end in pairwise(cut.bounds)
    ):
        # Collectives are of equal parts, which uneven ones are filled up to.
        found.pop("tensor"), reckoned.pop("tensor")
    return [] if found == reckoned else [f"{name}: {found} values were said, not {reckoned}"]


def test_two_processes_compute_what_one_does():
    """In one group of processes, for starting them takes longer than any case."""
    assert_as_one_process(2)


def test_between_passes_a_process_has_no_more_gradients_than_weights():
    for found in run_together("tests.training.parallel.gradient_memory", 2):
        assert found["gradients"] == found["weights"] > 0


@pytest.mark.distributed
def test_four_processes_compute_what_one_does():
    assert_as_one_process(4)
