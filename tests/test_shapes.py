"""Names keep their promises: a tensor called `x_MD` has two axes, M and D, wherever it lives.

The legend is docs/notation.md. Every local variable of the package is looked at when its function
returns, while models of every arm read, decode and learn.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F

from jamba_lm.model.batch import Batch
from jamba_lm.model.routing import balance_loss
from tests.arms import ARMS, random_ids, shaken_model

NOTATION = Path(__file__).resolve().parent.parent / "docs" / "notation.md"
LEGEND = NOTATION.read_text(encoding="utf-8").split("\n## ")[0]
LETTERS = re.findall(r"^\| ([A-Z1]) \|", LEGEND, flags=re.MULTILINE)
SUFFIX = re.compile(rf"_([{''.join(LETTERS)}]+)$")


class Watch:
    """What was seen while functions returned: names that kept their promise, and that did not."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.broken: list[str] = []

    def look(self, frame: FrameType, event: str, _arg: object) -> None:
        if event != "return" or "/jamba_lm/" not in frame.f_code.co_filename:
            return
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in frame.f_locals.items():
            match = SUFFIX.search(name)
            if not (match and isinstance(value, torch.Tensor)):
                continue
            where = f"{frame.f_code.co_qualname}: {name} is {tuple(value.shape)}"
            if value.ndim != len(match[1]):
                self.broken.append(where)
                continue
            self.kept.add(f"{frame.f_code.co_qualname}.{name}")
            for letter, size in zip(match[1], value.shape, strict=True):
                known, first = sizes.setdefault(letter, (1 if letter == "1" else size, name))
                if known != size:
                    self.broken.append(f"{where}, but {letter} is {known} in {first}")


@contextmanager
def shapes_are_as_named() -> Iterator[Watch]:
    """Fail when a local `x_MD` has not two axes, or when M means two sizes in one function."""
    watch = Watch()
    sys.setprofile(watch.look)
    try:
        yield watch
    finally:
        sys.setprofile(None)
    assert not watch.broken, "\n".join(sorted(set(watch.broken)))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("arm", ARMS)
def test_names_keep_their_promises_when_reading_and_decoding(arm, backend):
    model = shaken_model(ARMS[arm], backend=backend)
    prompts = [random_ids(model.config, length) for length in (1, 7, 12)]
    with shapes_are_as_named() as watch:
        # The modules, which native calls for whole models pass by.
        states = [model.new_state() for _ in prompts]
        for ids in (prompts, [ids[:1] for ids in prompts]):
            batch = Batch.of([len(one) for one in ids], states, backend)
            model.decoder(torch.tensor([one for part in ids for one in part]), batch)
    assert len(watch.kept) > 10


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("arm", ARMS)
def test_names_keep_their_promises_when_learning(arm, backend):
    model = shaken_model(ARMS[arm], backend=backend)
    lengths = [3, 9]
    ids_M = torch.tensor(random_ids(model.config, sum(lengths)))
    with shapes_are_as_named() as watch:
        batch = Batch.of(lengths, backend=backend, routing=[])
        loss = F.cross_entropy(model.decoder(ids_M, batch), ids_M)
        if batch.routing:
            loss = loss + balance_loss(batch.routing)
        loss.backward()
    assert len(watch.kept) > 10


def test_a_broken_promise_is_found(tmp_path):
    source = tmp_path / "jamba_lm" / "liar.py"
    source.parent.mkdir()
    source.write_text(
        "import torch\n"
        "def wrong_rank():\n    x_MD = torch.zeros(3)\n"
        "def wrong_size():\n    x_MD, y_MD = torch.zeros(3, 4), torch.zeros(3, 5)\n"
    )
    names: dict[str, object] = {}
    exec(compile(source.read_text(), str(source), "exec"), names)
    with pytest.raises(AssertionError, match="x_MD is \\(3,\\)"), shapes_are_as_named():
        names["wrong_rank"]()
    with pytest.raises(AssertionError, match="but D is 4 in x_MD"), shapes_are_as_named():
        names["wrong_size"]()
