"""Who sits where, and which layouts are refused, with what words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jamba_lm.config import JambaConfig
from jamba_lm.errors import RecipeError
from jamba_lm.parallel_layout import AXES, ParallelLayout
from tests.arms import ARMS, SMALL

ROOT = Path(__file__).resolve().parents[1]
EVEN = SMALL.replace(vocab_size=96)


def test_ranks_are_numbered_with_tensor_innermost():
    layout = ParallelLayout(replicate=2, shard=3, context=2, tensor=2)
    seen = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert seen == sorted(seen, key=lambda places: [places[axis] for axis in AXES])
    assert len({tuple(places.values()) for places in seen}) == layout.world_size == 24
    assert seen[1] == {"replicate": 0, "shard": 0, "context": 0, "tensor": 1}


def test_processes_that_share_rows_read_the_same():
    layout = ParallelLayout(replicate=2, shard=2, context=2, tensor=2)
    readers = [layout.reader(rank) for rank in range(16)]
    assert readers == [rank // 4 for rank in range(16)]
    assert layout.num_readers == 4


def test_expert_shards_are_what_experts_leave_of_the_other_rows():
    assert ParallelLayout(shard=4, context=2, expert=2).expert_shard == 4
    assert ParallelLayout(shard=4, context=2, expert=8).expert_shard == 1


REFUSED = {
    "no process": ({"shard": 0}, EVEN, 1, "parallel.shard=0, expected a number of processes"),
    "half a process": ({"tensor": 1.5}, EVEN, 1, "parallel.tensor=1.5, expected a number"),
    "true processes": ({"context": True}, EVEN, 1, "parallel.context=True, expected a number"),
    "a word for a flag": ({"sequence": "yes"}, EVEN, 1, "parallel.sequence='yes', expected true"),
    "another number of processes": (
        {"shard": 2, "tensor": 2},
        EVEN,
        8,
        "replicate=1 x shard=2 x context=1 x tensor=2 = 4 processes and 8 were started",
    ),
    "sequence alone": (
        {"shard": 2, "sequence": True},
        EVEN,
        2,
        "parallel.sequence shares rows among the tensor processes, of which there is one",
    ),
    "experts of a dense model": (
        {"shard": 2, "expert": 2},
        ARMS["hybrid, dense"],
        2,
        "parallel.expert=2 for a model without experts: set it to 1",
    ),
    "more experts' places than rows": (
        {"shard": 2, "tensor": 2, "expert": 4},
        EVEN,
        4,
        "parallel.expert=4 does not divide shard=2 x context=1",
    ),
    "experts across replicas": (
        {"replicate": 2, "expert": 2},
        EVEN,
        2,
        "parallel.expert=2 does not divide shard=1 x context=1",
    ),
    "a part of an expert each": (
        {"shard": 8, "expert": 8},
        EVEN,
        8,
        "parallel.expert=8 does not divide num_experts=4",
    ),
    "odd words": ({"tensor": 2}, SMALL, 2, "parallel.tensor=2 does not divide vocab_size=97"),
    "odd widths": (
        {"tensor": 2},
        EVEN.replace(d_ff=47),
        2,
        "parallel.tensor=2 does not divide d_ff=47",
    ),
    "odd heads": (
        {"tensor": 3},
        EVEN,
        3,
        "parallel.tensor=3 does not divide num_heads=4",
    ),
    "odd channels": (
        {"tensor": 2},
        EVEN.replace(d_model=33, expand=1, d_head=8),
        2,
        "parallel.tensor=2 does not divide d_inner=33",
    ),
    "key heads between": (
        {"tensor": 4},
        EVEN.replace(num_heads=12, num_kv_heads=6, d_head=8),
        4,
        "parallel.tensor=4 neither divides num_kv_heads=6 nor is a multiple of it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    sizes, config, world_size, message = REFUSED[name]
    with pytest.raises(RecipeError, match=re.escape(message)) as refusal:
        ParallelLayout(**sizes).validate(config, world_size)
    assert "\n" not in str(refusal.value)


def test_what_a_model_does_not_have_need_not_divide():
    attention, mamba = ARMS["only attention, rotary"], ARMS["only Mamba"]
    ParallelLayout(tensor=2).validate(
        attention.replace(vocab_size=96, d_model=33, d_head=8), world_size=2
    )
    ParallelLayout(tensor=4).validate(
        mamba.replace(vocab_size=96, num_heads=3, num_kv_heads=3), world_size=4
    )


def test_published_models_spread_over_a_node():
    layout = ParallelLayout(tensor=8, sequence=True, shard=16, expert=16, context=2)
    layout.validate(JambaConfig(), world_size=256)


AXES_OF_THE_TABLE = ("replicate", "shard", "context", "tensor", "sequence", "expert")


def table_of_pairs() -> dict[tuple[str, str], str]:
    """Read what docs/parallel.md says of every two axes together."""
    text = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    lines = text.partition("## What goes with what")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    header, _, *body = rows
    assert tuple(header[1:]) == AXES_OF_THE_TABLE
    return {
        (row[0], axis): cell
        for row in body
        for axis, cell in zip(header[1:], row[1:], strict=True)
        if cell
    }


def is_accepted(axes: set[str]) -> bool:
    layout = ParallelLayout(**{axis: True if axis == "sequence" else 2 for axis in axes})
    try:
        layout.validate(EVEN, layout.world_size)
    except RecipeError:
        return False
    return True


def test_the_table_of_what_goes_with_what_is_true():
    table = table_of_pairs()
    count = len(AXES_OF_THE_TABLE)
    assert len(table) == count * (count + 1) // 2
    for pair, cell in table.items():
        needed = set(cell.removeprefix("with ").split(" and ")) if cell != "yes" else set()
        assert needed <= set(AXES_OF_THE_TABLE), cell
        assert is_accepted({*pair, *needed}), (pair, cell)
        for one in needed:
            assert not is_accepted({*pair, *needed} - {one}), (pair, cell)


def test_a_layout_is_checked_without_torch():
    code = (
        "import sys\n"
        "from jamba_lm.config import JambaConfig\n"
        "from jamba_lm.parallel_layout import ParallelLayout\n"
        "ParallelLayout(shard=4, tensor=2).validate(JambaConfig(), 8)\n"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")})
    assert run.returncode == 0
