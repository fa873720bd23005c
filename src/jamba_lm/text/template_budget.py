"""What one run of a chat template may use: size of values, steps, time.

Knows nothing about Jinja.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DEPTH_LIMIT = 64
STEP_LIMIT = 2_000_000
SECONDS_LIMIT = 5.0
# A value may be this large, in characters and elements, plus a multiple of what went in.
SIZE_FLOOR = 2**20
SIZE_PER_INPUT = 8


class BoundExceeded(Exception):
    """The template grew, ran or nested beyond its bounds."""


@dataclass(slots=True)
class Budget:
    """What one run of a template may still use."""

    size_limit: int = SIZE_FLOOR
    steps_left: int = STEP_LIMIT
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS_LIMIT)
    _sizes: dict[int, tuple[int, int, Any]] = field(default_factory=dict)

    def take_in(self, values: Any) -> None:
        """Let values grow beyond what goes in: a long conversation makes a long text."""
        self.size_limit = 2**62
        self.size_limit = SIZE_FLOOR + SIZE_PER_INPUT * self.size(values)

    def spend(self, steps: int = 1) -> None:
        """Count some steps, and look at the clock."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise BoundExceeded(f"it takes more than {STEP_LIMIT:,} steps")
        if time.monotonic() > self.deadline:
            raise BoundExceeded(f"it takes more than {SECONDS_LIMIT:g} s")

    def allow(self, size: float) -> None:
        """Refuse a value of this size, before it is made if need be."""
        if size > self.size_limit:
            raise BoundExceeded(f"it makes a value of more than {self.size_limit:,} characters")

    def measured(self, value: Any) -> Any:
        """Return `value`, if all that hangs on it is small enough."""
        self.allow(self.size(value))
        return value

    def size(self, value: Any) -> int:
        """Return how many characters and elements `value` would be, written out."""
        return self._measure(value)[0]

    def depth(self, value: Any) -> int:
        """Return how deep `value` is nested."""
        return self._measure(value)[1]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Return the size and the depth of `value`.

        An element that occurs twice counts twice, as it does for whoever prints or compares the
        whole; what is measured already is remembered, so this is quick all the same.
        """
        if isinstance(value, str | bytes):
            return len(value) + 1, 0
        if isinstance(value, int):
            return 1 + value.bit_length() // 3, 0
        if not isinstance(value, list | tuple | dict | set | frozenset):
            return 8, 0
        known = self._sizes.get(id(value))
        if known is not None:
            return known[0], known[1]
        self.spend(1 + len(value) // 16)
        size, depth = 1, 0
        if isinstance(value, dict):
            children: Iterable[Any] = (part for item in value.items() for part in item)
        else:
            children = value
        for child in children:
            child_size, child_depth = self._measure(child)
            size += child_size
            depth = max(depth, child_depth + 1)
            if depth > DEPTH_LIMIT:
                raise BoundExceeded(f"it nests values more than {DEPTH_LIMIT} deep")
            self.allow(size)
        # The value is kept, so that its id is not given to another one.
        self._sizes[id(value)] = (size, depth, value)
        return size, depth
