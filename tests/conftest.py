"""What every test runs under: no network, a fixed seed, and fresh memory that is never zero."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from typing import Any, NoReturn

# Both are read when the libraries are first imported, so they are set before any test file is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import numpy as np
import pytest
import torch

from tests.tiny_checkpoint import tiny_chat_checkpoint, tiny_checkpoint  # noqa: F401 - fixtures

# Times on a shared machine say nothing about correctness, so no deadline; the examples are the
# same on every run, so that a red test stays red until it is mended.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")

# torch lists its factory functions at the first use of a device context, once: were that while
# they are poisoned below, `with torch.device("meta")` would be ignored from then on.
with torch.device("meta"):
    torch.empty(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code may draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave the machine; loopback and Unix sockets stay open."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host.startswith("127.") or host in ("localhost", "::1")):
                refuse(address)
        connect(self, address)

    def refuse(address: Any) -> NoReturn:
        raise AssertionError(f"a test tried to reach {address}: tests run without a network")

    monkeypatch.setattr(socket.socket, "connect", guarded)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Fill what `allocate` returns with NaN, so that reading it before writing shows."""

    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if x.is_floating_point() and x.device.type == "cpu":
            with torch.no_grad():
                x.fill_(float("nan"))
        return x

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` and its relatives return NaN instead of whatever lay there."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
