"""What a sequence remembers, as a value: it can be forked, rewound, saved and loaded.

Attention layers remember keys and values of every token, Mamba layers a convolution window and a
scan state of fixed size. Does not know the layers that use it.

S tokens remembered, G key/value heads, P head width, C Mamba channels, N state size,
L = convolution taps - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.config import JambaConfig
from jamba_lm.errors import StateError
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.state_file import read_state, write_state

# A block holds as many tokens as came before it, within these bounds: a chat of 100 tokens does not
# reserve room for 4,096, and 100,000 tokens are some thirty blocks.
SMALLEST_BLOCK = 64
LARGEST_BLOCK = 4096


class _Block:
    """Keys and values of consecutive tokens, written once from front to back, shared by forks."""

    __slots__ = ("addresses", "keys_SGP", "num_written", "values_SGP")

    def __init__(self, keys_SGP: Tensor, values_SGP: Tensor, num_written: int) -> None:
        self.keys_SGP = keys_SGP
        self.values_SGP = values_SGP
        self.num_written = num_written
        self.addresses = (keys_SGP.data_ptr(), values_SGP.data_ptr())

    @property
    def num_bytes(self) -> int:
        return self.keys_SGP.nbytes + self.values_SGP.nbytes


class KeyValueState:
    """The keys and values of one attention layer: an append-only chain of shared blocks.

    A fork shares every block. Whoever writes first goes on in the shared last block, past the
    part that the other can see; the second finds it taken and opens a block of its own. So no
    token's keys are ever copied, and none is ever overwritten.
    """

    __slots__ = ("_dtype", "_full", "_last", "_num_in_last", "_shape", "num_tokens")

    def __init__(self, num_kv_heads: int, d_head: int, dtype: torch.dtype) -> None:
        self._shape = (num_kv_heads, d_head)
        self._dtype = dtype
        self._full: tuple[tuple[_Block, int], ...] = ()
        self._last: _Block | None = None
        self._num_in_last = 0
        self.num_tokens = 0

    def append(self, k_TGP: Tensor, v_TGP: Tensor) -> None:
        """Remember T more tokens."""
        if torch.is_grad_enabled() and (k_TGP.requires_grad or v_TGP.requires_grad):
            # Writing into a shared buffer would cut the graph: the tensors become a block.
            self._seal()
            self._full += ((_Block(k_TGP, v_TGP, len(k_TGP)), len(k_TGP)),)
            self.num_tokens += len(k_TGP)
            return
        done = 0
        while done < len(k_TGP):
            block = self._writable_block(len(k_TGP) - done)
            first = self._num_in_last
            count = min(len(k_TGP) - done, len(block.keys_SGP) - first)
            block.num_written = first + count
            block.keys_SGP[first : first + count] = k_TGP[done : done + count].detach()
            block.values_SGP[first : first + count] = v_TGP[done : done + count].detach()
            self._num_in_last += count
            self.num_tokens += count
            done += count

    def reserve(self, num_tokens: int) -> None:
        """Remember T more tokens that the caller is about to write, side by side.

        They are the last rows of the last of `key_blocks` and `value_blocks`. Not for tensors that
        need gradients.
        """
        block = self._last
        if block is not None and len(block.keys_SGP) - self._num_in_last < num_tokens:
            # The few rows that stay empty are cheaper than writing in two places.
            self._seal()
        block = self._writable_block(num_tokens)
        block.num_written = self._num_in_last + num_tokens
        self._num_in_last += num_tokens
        self.num_tokens += num_tokens

    def follow(self, before: KeyValueState, num_tokens: int) -> int:
        """Become what a fork of `before` is after `reserve`: nobody may have this object.

        Returns the tokens in the last block if the blocks are those of `before`, else 0.
        """
        self._take(before)
        self.reserve(num_tokens)
        return self._num_in_last if self._last is before._last else 0

    def _writable_block(self, num_coming: int) -> _Block:
        block = self._last
        if block is not None and block.num_written == self._num_in_last < len(block.keys_SGP):
            return block
        self._seal()
        room = min(max(self.num_tokens, num_coming, SMALLEST_BLOCK), LARGEST_BLOCK)
        keys_SGP, values_SGP = (torch.empty(room, *self._shape, dtype=self._dtype) for _ in "kv")
        self._last = _Block(keys_SGP, values_SGP, 0)
        return self._last

    def _seal(self) -> None:
        if self._last is not None and self._num_in_last:
            self._full += ((self._last, self._num_in_last),)
        self._last, self._num_in_last = None, 0

    def _parts(self) -> list[tuple[_Block, int]]:
        parts = list(self._full)
        if self._last is not None and self._num_in_last:
            parts.append((self._last, self._num_in_last))
        return parts

    def key_blocks(self) -> list[Tensor]:
        """List the keys of all tokens, oldest first, as blocks [S_j, G, P] that are not copies."""
        return [block.keys_SGP[:count] for block, count in self._parts()]

    def value_blocks(self) -> list[Tensor]:
        """List the values of all tokens in the blocks of `key_blocks`."""
        return [block.values_SGP[:count] for block, count in self._parts()]

    def block_addresses(self) -> list[int]:
        """List where keys lie, where values lie, and how many, block after block."""
        return [n for block, count in self._parts() for n in (*block.addresses, count)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks held, room not yet written and blocks shared with forks included."""
        return sum(block.num_bytes for block, _ in self._parts())

    def fork(self) -> KeyValueState:
        """Return a state that remembers the same and goes its own way."""
        other = KeyValueState(*self._shape, self._dtype)
        other._take(self)
        return other

    def _take(self, other: KeyValueState) -> None:
        self._full, self._last = other._full, other._last
        self._num_in_last, self.num_tokens = other._num_in_last, other.num_tokens

    def _take_room_of(self, other: KeyValueState) -> None:
        # Whoever writes behind this state's last token first is the only one to: if the other did,
        # what is there is its own.
        block, mine = self._last, self._num_in_last
        if block is not None and any(block is one and n > mine for one, n in other._parts()):
            block.num_written = mine

    def tensors(self) -> dict[str, Tensor]:
        """Return what to save: all keys and all values, [S, G, P]."""
        none = torch.empty(0, *self._shape, dtype=self._dtype)
        blocks = {"keys": self.key_blocks(), "values": self.value_blocks()}
        return {name: torch.cat([none, *one]) for name, one in blocks.items()}


class MambaState:
    """The memory of one Mamba layer: its size does not depend on the tokens read.

    Layers replace these tensors and never write into them, so forks share them safely.

    Attributes:
        conv_LC: the last inputs of the convolution, oldest first, in the model's dtype.
        scan_CN: the recurrent state, float32 whatever the model's dtype.
    """

    __slots__ = ("conv_LC", "scan_CN")

    def __init__(self, conv_LC: Tensor, scan_CN: Tensor) -> None:
        self.conv_LC = conv_LC
        self.scan_CN = scan_CN

    @property
    def num_bytes(self) -> int:
        """Bytes of the window and the state."""
        return self.conv_LC.nbytes + self.scan_CN.nbytes

    def fork(self) -> MambaState:
        """Return a state that remembers the same and goes its own way."""
        return MambaState(_alone(self.conv_LC), _alone(self.scan_CN))

    def tensors(self) -> dict[str, Tensor]:
        """Return what to save."""
        return {"conv": self.conv_LC, "scan": self.scan_CN}


def _alone(x: Tensor) -> Tensor:
    # A step of many sequences leaves each a slice of one tensor. Whoever keeps the slice would keep
    # the memory of all the others too, so forks and snapshots take a copy of a true slice.
    if x.requires_grad or x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone()


LayerState = KeyValueState | MambaState


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


class SequenceState:
    """Everything that one sequence remembers. Nothing else in the project remembers anything.

    Made by `LanguageModel.new_state`, moved forward by `Decoder.forward`. Not safe to move from two
    threads at once, forks included: they share blocks.

    Attributes:
        layers: its memory of each layer, which may be written again: take a `fork` to keep it.
    """

    def __init__(
        self, config: JambaConfig, dtype: torch.dtype, fingerprint: Callable[[], str]
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._fingerprint = fingerprint
        self._log = _TokenLog([], 0)
        self.layers: list[LayerState] = [
            KeyValueState(config.num_kv_heads, config.d_head, dtype)
            if spec.mixer == "attention"
            else MambaState(
                torch.zeros(config.conv_width - 1, config.d_inner, dtype=dtype),
                torch.zeros(config.d_inner, config.state_size),
            )
            for spec in plan_layers(config)
        ]

    def fits(self, config: JambaConfig, dtype: torch.dtype) -> bool:
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

    def fork(self) -> SequenceState:
        """Return a state that remembers the same tokens and goes its own way.

        The cost does not depend on the number of tokens: keys and values are shared.
        """
        other = SequenceState.__new__(SequenceState)
        other._config, other._dtype = self._config, self._dtype
        other._fingerprint, other._log = self._fingerprint, self._log
        other.layers = [layer.fork() for layer in self.layers]
        return other

    def snapshot(self) -> Snapshot:
        """Return a point to which this state, or a fork of it, can be rewound."""
        return Snapshot(self.fork())

    def rewind(self, snapshot: Snapshot) -> None:
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

    def take_over(self, ahead: SequenceState) -> None:
        """Go on where `ahead` is, a fork of this state that has read more."""
        self.layers, self._log = ahead.layers, ahead._log
        ahead.layers = []

    def discard(self, ahead: SequenceState) -> None:
        """Throw away a fork of this state that has read more, and of which no fork is kept.

        What it wrote in shared blocks will be written over. Without this, the next tokens would
        open a block, and a list of ids, of their own beside what nobody reads any more.
        """
        for layer, other in zip(self.layers, ahead.layers, strict=True):
            if isinstance(layer, KeyValueState) and isinstance(other, KeyValueState):
                layer._take_room_of(other)
        log = self._log
        if ahead._log.ids is log.ids and ahead.num_tokens > log.num_tokens:
            del log.ids[log.num_tokens :]
        ahead.layers = []

    def move_to(self, after: SequenceState, ids: Sequence[int]) -> None:
        """Take over the memory of `after`, which has read `ids` more than this state."""
        self.advance(after.layers, ids)

    def advance(self, layers: list[LayerState], ids: Sequence[int]) -> None:
        """Go on with `layers`, which have read `ids` more than this state's own."""
        self.layers = layers
        self._log = self._log.followed_by(ids)

    def save(self, path: str | Path) -> None:
        """Write this state to a safetensors file, with the model's fingerprint and the token ids.

        The file is whole or absent. `jamba_lm.load_state(path, model)` reads it.
        """
        tensors = {"ids": torch.tensor(self.ids, dtype=torch.int32)}
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                tensors[f"layers.{index}.{name}"] = tensor.detach().contiguous()
        write_state(Path(path), tensors, self._fingerprint())

    def restore(self, path: str | Path) -> None:
        """Take over what `save` wrote.

        Raises:
            StateError: the file is missing, cut short, altered, not a state, or of another model;
                this state is left as it was.
        """
        like: dict[str, Tensor] = {}
        per_token = {"ids"}
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                like[f"layers.{index}.{name}"] = tensor
                if isinstance(layer, KeyValueState):
                    per_token.add(f"layers.{index}.{name}")
        like["ids"] = torch.tensor([], dtype=torch.int32)
        tensors = read_state(Path(path), self._fingerprint(), like, per_token)
        if any(not 0 <= one < self._config.vocab_size for one in tensors["ids"].tolist()):
            raise StateError(f"{path} holds token ids outside 0..{self._config.vocab_size - 1}")
        self._adopt(tensors)

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        ids = tensors["ids"].tolist()
        layers: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, KeyValueState):
                fresh = KeyValueState(*layer._shape, layer._dtype)
                fresh.append(tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"])
                layers.append(fresh)
            else:
                layers.append(
                    MambaState(tensors[f"layers.{index}.conv"], tensors[f"layers.{index}.scan"])
                )
        self.layers, self._log = layers, _TokenLog(ids, len(ids))


class Snapshot:
    """A point in a sequence to which a state can be rewound, any number of times."""

    __slots__ = ("_state",)

    def __init__(self, state: SequenceState) -> None:
        self._state = state

    @property
    def num_tokens(self) -> int:
        """Tokens that had been read."""
        return self._state.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, those shared with the state included."""
        return self._state.num_bytes
