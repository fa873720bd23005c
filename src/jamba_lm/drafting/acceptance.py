"""How often a guess comes true, by the length of the match it was made from.

Learned from every token that is written, drafted or not: what would have been guessed is known
anyway, so finding out costs nothing.
"""

from __future__ import annotations

# The shortest match of each class, and how often the token behind such a match comes again in
# English prose (57,553 tokens of held-out text, 4,096-token vocabulary, rounded down). A sequence
# soon has rates of its own.
CLASSES = {2: 0.25, 3: 0.4, 4: 0.5, 7: 0.5, 12: 0.7, 24: 0.85}
# What the expected rate counts for, and how far back is remembered, in guesses.
PRIOR_WEIGHT = 4.0
MEMORY = 40.0
# A token that is less likely than this to be reached is not worth thinking about.
LEAST_CHANCE = 0.02


class AcceptanceRates:
    """The share of guesses that came true in one sequence."""

    def __init__(self) -> None:
        """Expect what is usual."""
        self._hits = [rate * PRIOR_WEIGHT for rate in CLASSES.values()]
        self._guesses = [PRIOR_WEIGHT] * len(CLASSES)
        shortest = [*CLASSES, max(CLASSES) + 1]
        self._class_of = [
            max(0, sum(length >= one for one in CLASSES) - 1) for length in range(shortest[-1])
        ]

    def observe(self, length: int, hit: bool) -> None:
        """Note whether the guess after a match of this length came true."""
        one = self._class(length)
        if self._guesses[one] >= MEMORY:
            keep = (MEMORY - 1) / self._guesses[one]
            self._guesses[one] *= keep
            self._hits[one] *= keep
        self._guesses[one] += 1
        self._hits[one] += hit

    def rate(self, length: int) -> float:
        """Return the share of guesses after matches of about this length that came true."""
        one = self._class(length)
        return self._hits[one] / self._guesses[one]

    def chances(self, length: int, count: int) -> list[float]:
        """Return how likely the first, the first two, ... guesses after a match all come true.

        Each guess that does makes the match one longer. At most `count` are listed, and none that
        is hardly ever reached.
        """
        # Asked for every token: no calls.
        hits, guesses, class_of = self._hits, self._guesses, self._class_of
        last = len(class_of) - 1
        chances: list[float] = []
        chance = 1.0
        for longer in range(length, length + count):
            one = class_of[longer if longer < last else last]
            chance *= hits[one] / guesses[one]
            if chance < LEAST_CHANCE:
                break
            chances.append(chance)
        return chances

    def _class(self, length: int) -> int:
        return self._class_of[min(length, len(self._class_of) - 1)]
