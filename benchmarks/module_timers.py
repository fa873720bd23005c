"""Times a model's modules and operations from outside, each without what it calls.

Hooks on every module, and timers around the operations of `kernels/ops`; they are taken off again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from jamba_lm.kernels import ops
from jamba_lm.language_model import LanguageModel

# Operations of the roofline, by the end of a module's name.
MODULE_PARTS = {
    **{f"mixer.{name}_proj": f"{name}_proj" for name in ("in", "x", "dt", "out", "o")},
    **{f"mixer.{name}_proj": "qkv_proj" for name in "qkv"},
    **{f"feed_forward.{name}_proj": "MLP" for name in ("gate", "up", "down")},
    "feed_forward.router": "router",
    "embedding": "embedding",
}
OPERATION_PARTS = {
    "causal_conv": "convolution",
    "selective_scan": "scan",
    "attention": "attention",
    "rms_norm": "norms",
    "silu_gate": "gates",
}


class Parts:
    """Seconds and calls of each part; a part's own time is without what it called.

    Args:
        clock: seconds that have passed, since whenever.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[tuple[str, float]] = []
        self._inside: list[float] = []

    def clear(self) -> None:
        """Forget what was timed so far."""
        self.seconds.clear()
        self.calls.clear()

    def enter(self, part: str) -> None:
        """Begin a part."""
        self._open.append((part, self._clock()))
        self._inside.append(0.0)

    def leave(self) -> None:
        """End the part that began last."""
        part, started = self._open.pop()
        taken = self._clock() - started
        self.seconds[part] += taken - self._inside.pop()
        if self._open:
            self._inside[-1] += taken
        # A part within itself, such as an operation in its module, is one call.
        if not self._open or self._open[-1][0] != part:
            self.calls[part] += 1


def part_of(name: str, module: nn.Module) -> str:
    """Return the part that a module's own time belongs to."""
    if ".experts." in name:
        return "experts"
    for ending, part in MODULE_PARTS.items():
        if name == ending or name.endswith(f".{ending}"):
            return part
    kind = type(module).__name__
    return "norms" if kind in ("RMSNorm", "NoNorm") else f"glue of {kind}"


@contextmanager
def watched(model: LanguageModel, parts: Parts) -> Iterator[None]:
    """Time every module of the model and every operation into `parts`, meanwhile."""
    hooks: list[Any] = []
    watched_functions = [(ops, name, part) for name, part in OPERATION_PARTS.items()]
    originals = [(place, name, getattr(place, name)) for place, name, _ in watched_functions]

    def enter(part: str) -> Callable[..., None]:
        return lambda *_: parts.enter(part)

    def leave(*_: Any) -> None:
        parts.leave()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            parts.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                parts.leave()

        return run

    for name, module in model.decoder.named_modules():
        # A list of modules is never called, and the head is timed with what `logits` does to it.
        if isinstance(module, nn.ModuleList) or name == "head":
            continue
        hooks.append(module.register_forward_pre_hook(enter(part_of(name, module))))
        hooks.append(module.register_forward_hook(leave))
    for place, name, part in watched_functions:
        setattr(place, name, timed(part, getattr(place, name)))
    logits = model.decoder.logits
    model.decoder.logits = timed("head", logits)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for place, name, function in originals:
            setattr(place, name, function)
        del model.decoder.logits
