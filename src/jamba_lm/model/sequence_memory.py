"""What a sequence remembers, whoever keeps the numbers: forks, points to go back to, ids read.

Attention layers remember keys and values of every token, Mamba layers a convolution window and a
scan state of fixed size. Here is who shares what with whom; `state.py` keeps the numbers in
tensors, and `array_state.py` in arrays, for programs that do without torch. Needs no torch.

S tokens remembered, G key/value heads, P head width, C Mamba channels, N state size,
L = convolution taps - 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar, cast

from jamba_lm.config import JambaConfig
from jamba_lm.errors import StateError

# A block holds as many tokens as came before it, within these bounds: a chat of 100 tokens does not
# reserve room for 4,096, and 100,000 tokens are some thirty blocks.
SMALLEST_BLOCK = 64
LARGEST_BLOCK = 4096

X = TypeVar("X")


class Block(Generic[X]):
    """Keys and values of consecutive tokens, written once from front to back, shared by forks.

    Attributes:
        keys_SGP: with room for more tokens than are written.
        values_SGP: likewise.
        addresses: where the two begin.
        room: tokens that fit.
        num_bytes: of both.
        num_written: tokens that somebody has written.
    """

    __slots__ = ("addresses", "keys_SGP", "num_bytes", "num_written", "room", "values_SGP")

    def __init__(
        self, keys_SGP: X, values_SGP: X, addresses: tuple[int, int], room: int, num_bytes: int
    ) -> None:
        self.keys_SGP = keys_SGP
        self.values_SGP = values_SGP
        self.addresses = addresses
        self.room = room
        self.num_bytes = num_bytes
        self.num_written = 0


class KeyValueChain(ABC, Generic[X]):
    """The keys and values of one attention layer: an append-only chain of shared blocks.

    A fork shares every block. Whoever writes first goes on in the shared last block, past the
    part that the other can see; the second finds it taken and opens a block of its own. So no
    token's keys are ever copied, and none is ever overwritten.
    """

    __slots__ = ("_full", "_last", "_num_in_last", "num_tokens")

    def __init__(self) -> None:
        self._full: tuple[tuple[Block[X], int], ...] = ()
        self._last: Block[X] | None = None
        self._num_in_last = 0
        self.num_tokens = 0

    @abstractmethod
    def fresh(self) -> Self:
        """Return one of the same kind that remembers nothing."""

    @abstractmethod
    def _new_block(self, room: int) -> Block[X]:
        """Return an empty block for so many tokens."""

    def reserve(self, num_tokens: int) -> None:
        """Remember T more tokens that the caller is about to write, side by side.

        They are the last rows of the last block. Not for tensors that need gradients.
        """
        block = self._last
        if block is not None and block.room - self._num_in_last < num_tokens:
            # The few rows that stay empty are cheaper than writing in two places.
            self._seal()
        block = self._writable_block(num_tokens)
        block.num_written = self._num_in_last + num_tokens
        self._num_in_last += num_tokens
        self.num_tokens += num_tokens

    def follow(self, before: Self, num_tokens: int) -> int:
        """Become what a fork of `before` is after `reserve`: nobody may have this object.

        Returns the tokens in the last block if the blocks are those of `before`, else 0.
        """
        self._take(before)
        self.reserve(num_tokens)
        return self._num_in_last if self._last is before._last else 0

    def block_addresses(self) -> list[int]:
        """List where keys lie, where values lie, and how many, block after block."""
        return [n for block, count in self._parts() for n in (*block.addresses, count)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks held, room not yet written and blocks shared with forks included."""
        return sum(block.num_bytes for block, _ in self._parts())

    def fork(self) -> Self:
        """Return a state that remembers the same and goes its own way."""
        other = self.fresh()
        other._take(self)
        return other

    def take_room_of(self, other: Self) -> None:
        """Write over what `other` wrote behind this one's last token, once nobody has `other`."""
        # Whoever writes behind this state's last token first is the only one to: if the other did,
        # what is there is its own.
        block, mine = self._last, self._num_in_last
        if block is not None and any(block is one and n > mine for one, n in other._parts()):
            block.num_written = mine

    def _take(self, other: Self) -> None:
        self._full, self._last = other._full, other._last
        self._num_in_last, self.num_tokens = other._num_in_last, other.num_tokens

    def _writable_block(self, num_coming: int) -> Block[X]:
        block = self._last
        if block is not None and block.num_written == self._num_in_last < block.room:
            return block
        self._seal()
        block = self._new_block(
            min(max(self.num_tokens, num_coming, SMALLEST_BLOCK), LARGEST_BLOCK)
        )
        self._last = block
        return block

    def _seal(self) -> None:
        if self._last is not None and self._num_in_last:
            self._full += ((self._last, self._num_in_last),)
        self._last, self._num_in_last = None, 0

    def _parts(self) -> list[tuple[Block[X], int]]:
        parts = list(self._full)
        if self._last is not None and self._num_in_last:
            parts.append((self._last, self._num_in_last))
        return parts


class Loan:
    """Whether somebody else has what lies in a place."""

    __slots__ = ("given",)

    def __init__(self, *, given: bool) -> None:
        self.given = given


class RecurrentMemory(ABC):
    """The memory of one Mamba layer: its size does not depend on the tokens read.

    Attributes:
        loan: of the place that it lies in, if that is written again; told when somebody takes what
            lies there.
    """

    __slots__ = ("loan",)

    def __init__(self, loan: Loan | None = None) -> None:
        self.loan = loan

    @property
    @abstractmethod
    def addresses(self) -> tuple[int, int]:
        """Where the convolution window and the scan state begin."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the window and the state."""

    @abstractmethod
    def blank(self, loan: Loan | None = None) -> Self:
        """Return one of the same kind and size in memory of its own, which nobody has written."""

    @abstractmethod
    def _same(self) -> Self:
        """Return another one that remembers the same and goes its own way."""

    def fork(self) -> Self:
        """Return a state that remembers the same and goes its own way."""
        self.lend()
        return self._same()

    def lend(self) -> None:
        """Let it be known that somebody else has what lies here."""
        if self.loan is not None:
            self.loan.given = True


LayerMemory = KeyValueChain[Any] | RecurrentMemory

L = TypeVar("L", bound=LayerMemory)


class _TokenLog:
    """The ids read so far: forks share one growing list until they read different tokens."""

    __slots__ = ("ids", "num_tokens")

    def __init__(self, ids: list[int], num_tokens: int) -> None:
        self.ids = ids
        self.num_tokens = num_tokens

    def followed_by(self, ids: Sequence[int]) -> _TokenLog:
        shared = self.ids
        if len(shared) != self.num_tokens:
            shared = shared[: self.num_tokens]
        shared.extend(ids)
        return _TokenLog(shared, len(shared))


class SequenceMemory(Generic[L]):
    """Everything that one sequence remembers. Nothing else in the project remembers anything.

    Not safe to move from two threads at once, forks included: they share blocks.

    Attributes:
        layers: its memory of each layer, which may be written again: take a `fork` to keep it.
    """

    def __init__(self, config: JambaConfig, dtype: object, layers: list[L]) -> None:
        """Begin a sequence of which nothing has been read."""
        self._config = config
        self._dtype = dtype
        self._log = _TokenLog([], 0)
        self.layers = layers

    def fits(self, config: JambaConfig, dtype: object) -> bool:
        """Say whether it was made for a model of these sizes and this type."""
        return self._dtype == dtype and (self._config is config or self._config == config)

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self._log.num_tokens

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens read so far, as a list of its own."""
        return self._log.ids[: self._log.num_tokens]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, those shared with forks included."""
        return sum(layer.num_bytes for layer in self.layers)

    def fork(self) -> Self:
        """Return a state that remembers the same tokens and goes its own way.

        The cost does not depend on the number of tokens: keys and values are shared.
        """
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = cast("list[L]", [layer.fork() for layer in self.layers])
        return other

    def snapshot(self) -> Snapshot[L]:
        """Return a point to which this state, or a fork of it, can be rewound."""
        return Snapshot(self.fork())

    def rewind(self, snapshot: Snapshot[L]) -> None:
        """Forget everything read since `snapshot` was taken. The snapshot stays usable.

        Raises:
            StateError: this state does not descend from the snapshot.
        """
        past = snapshot._state
        known = past.num_tokens
        if (
            past._config != self._config
            or past._dtype != self._dtype
            or known > self.num_tokens
            or past.ids != self._log.ids[:known]
        ):
            raise StateError(
                f"cannot rewind a state of {self.num_tokens} tokens to a snapshot of {known} "
                "tokens that it does not begin with: rewind to a snapshot of the same sequence"
            )
        self.move_to(past.fork(), [])
        self._log = past._log

    def take_over(self, ahead: Self) -> None:
        """Go on where `ahead` is, a fork of this state that has read more."""
        self.layers, self._log = ahead.layers, ahead._log
        ahead.layers = []

    def discard(self, ahead: Self) -> None:
        """Throw away a fork of this state that has read more, and of which no fork is kept.

        What it wrote in shared blocks will be written over. Without this, the next tokens would
        open a block, and a list of ids, of their own beside what nobody reads any more.
        """
        for layer, other in zip(self.layers, ahead.layers, strict=True):
            if isinstance(layer, KeyValueChain) and isinstance(other, KeyValueChain):
                layer.take_room_of(other)
        log = self._log
        if ahead._log.ids is log.ids and ahead.num_tokens > log.num_tokens:
            del log.ids[log.num_tokens :]
        ahead.layers = []

    def move_to(self, after: Self, ids: Sequence[int]) -> None:
        """Take over the memory of `after`, which has read `ids` more than this state."""
        self.advance(after.layers, ids)

    def advance(self, layers: list[L], ids: Sequence[int]) -> None:
        """Go on with `layers`, which have read `ids` more than this state's own."""
        self.layers = layers
        self._log = self._log.followed_by(ids)

    def _begin_after(self, ids: list[int]) -> None:
        self._log = _TokenLog(ids, len(ids))


class Snapshot(Generic[L]):
    """A point in a sequence to which a state can be rewound, any number of times."""

    __slots__ = ("_state",)

    def __init__(self, state: SequenceMemory[L]) -> None:
        self._state = state

    @property
    def num_tokens(self) -> int:
        """Tokens that had been read."""
        return self._state.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, those shared with the state included."""
        return self._state.num_bytes
