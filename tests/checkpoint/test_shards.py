"""Tensors are dealt to files in their order, within the size, each file aligned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jamba_lm.checkpoint.shards import plan_shards
from jamba_lm.checkpoint.weight_layout import is_ours

SIZES = st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 50), min_size=1, max_size=20)


@given(sizes=SIZES, limit=st.integers(1, 120))
def test_every_tensor_is_in_one_file_of_bounded_size(sizes: dict[str, int], limit: int):
    shards = plan_shards(sizes, dict.fromkeys(sizes, torch.float32), limit)
    assert [name for names in shards.values() for name in names] == list(sizes)
    assert list(shards) == sorted(shards)
    for names in shards.values():
        assert sum(sizes[name] for name in names) <= limit or len(names) == 1


@given(sizes=SIZES, limit=st.integers(1, 120))
def test_no_file_could_have_taken_the_first_tensor_of_the_next(sizes: dict[str, int], limit: int):
    files = list(plan_shards(sizes, dict.fromkeys(sizes, torch.float32), limit).values())
    for names, following in pairwise(files):
        assert sum(sizes[name] for name in names) + sizes[following[0]] > limit


def test_wider_types_come_first_in_a_file():
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16, "d": torch.float32}
    assert plan_shards(dict.fromkeys("abcd", 3), dtypes, 100) == {
        "model.safetensors": ["b", "d", "a", "c"]
    }


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.safetensors", True),
        ("model-00002-of-00013.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("generation_config.json", True),
        ("tokenizer.json", False),
        ("adapter_model.safetensors", False),
        ("optimizer.safetensors", False),
        ("README.md", False),
    ],
)
def test_only_a_checkpoints_own_files_are_replaced(name: str, ours: bool):
    assert is_ours(name) is ours
