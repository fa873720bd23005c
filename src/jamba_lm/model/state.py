"""What a sequence remembers, in tensors: as the decoder's layers use it, and as a file.

Does not know the layers that use it.

S tokens remembered, G key/value heads, P head width, C Mamba channels, N state size,
L = convolution taps - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.config import JambaConfig
from jamba_lm.errors import StateError
from jamba_lm.model.array_state import ArrayState
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.sequence_memory import (
    Block,
    KeyValueChain,
    Loan,
    RecurrentMemory,
    SequenceMemory,
)
from jamba_lm.model.state_file import read_state, write_state


class KeyValueState(KeyValueChain[Tensor]):
    """The keys and values of one attention layer, in blocks of tensors."""

    __slots__ = ("_dtype", "_shape")

    def __init__(self, num_kv_heads: int, d_head: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = (num_kv_heads, d_head)
        self._dtype = dtype

    def fresh(self) -> KeyValueState:
        """Return one of the same kind that remembers nothing."""
        return KeyValueState(*self._shape, self._dtype)

    def append(self, k_TGP: Tensor, v_TGP: Tensor) -> None:
        """Remember T more tokens."""
        if torch.is_grad_enabled() and (k_TGP.requires_grad or v_TGP.requires_grad):
            # Writing into a shared buffer would cut the graph: the tensors become a block.
            self._seal()
            block = _block(k_TGP, v_TGP)
            block.num_written = len(k_TGP)
            self._full += ((block, len(k_TGP)),)
            self.num_tokens += len(k_TGP)
            return
        done = 0
        while done < len(k_TGP):
            block = self._writable_block(len(k_TGP) - done)
            first = self._num_in_last
            count = min(len(k_TGP) - done, block.room - first)
            block.num_written = first + count
            block.keys_SGP[first : first + count] = k_TGP[done : done + count].detach()
            block.values_SGP[first : first + count] = v_TGP[done : done + count].detach()
            self._num_in_last += count
            self.num_tokens += count
            done += count

    def key_blocks(self) -> list[Tensor]:
        """List the keys of all tokens, oldest first, as blocks [S_j, G, P] that are not copies."""
        return [block.keys_SGP[:count] for block, count in self._parts()]

    def value_blocks(self) -> list[Tensor]:
        """List the values of all tokens in the blocks of `key_blocks`."""
        return [block.values_SGP[:count] for block, count in self._parts()]

    def tensors(self) -> dict[str, Tensor]:
        """Return what to save: all keys and all values, [S, G, P]."""
        none = torch.empty(0, *self._shape, dtype=self._dtype)
        blocks = {"keys": self.key_blocks(), "values": self.value_blocks()}
        return {name: torch.cat([none, *one]) for name, one in blocks.items()}

    def _new_block(self, room: int) -> Block[Tensor]:
        keys_SGP, values_SGP = (torch.empty(room, *self._shape, dtype=self._dtype) for _ in "kv")
        return _block(keys_SGP, values_SGP)


def _block(keys_SGP: Tensor, values_SGP: Tensor) -> Block[Tensor]:
    addresses = keys_SGP.data_ptr(), values_SGP.data_ptr()
    num_bytes = keys_SGP.nbytes + values_SGP.nbytes
    return Block(keys_SGP, values_SGP, addresses, len(keys_SGP), num_bytes)


class MambaState(RecurrentMemory):
    """The memory of one Mamba layer, in tensors.

    Layers replace these tensors and never write into them, so forks share them safely.

    Attributes:
        conv_LC: the last inputs of the convolution, oldest first, in the model's dtype.
        scan_CN: the recurrent state, float32 whatever the model's dtype.
    """

    __slots__ = ("conv_LC", "scan_CN")

    def __init__(self, conv_LC: Tensor, scan_CN: Tensor, loan: Loan | None = None) -> None:
        super().__init__(loan)
        self.conv_LC = conv_LC
        self.scan_CN = scan_CN

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the convolution window and the scan state begin."""
        return self.conv_LC.data_ptr(), self.scan_CN.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Bytes of the window and the state."""
        return self.conv_LC.nbytes + self.scan_CN.nbytes

    def blank(self, loan: Loan | None = None) -> MambaState:
        """Return one of the same size in memory of its own, which nobody has written."""
        return MambaState(torch.empty_like(self.conv_LC), torch.empty_like(self.scan_CN), loan)

    def tensors(self) -> dict[str, Tensor]:
        """Return what to save."""
        self.lend()
        return {"conv": self.conv_LC, "scan": self.scan_CN}

    def _same(self) -> MambaState:
        return MambaState(_alone(self.conv_LC), _alone(self.scan_CN))


def _alone(x: Tensor) -> Tensor:
    # A step of many sequences leaves each a slice of one tensor. Whoever keeps the slice would keep
    # the memory of all the others too, so forks and snapshots take a copy of a true slice.
    if x.requires_grad or x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone()


LayerState = KeyValueState | MambaState


class SequenceState(SequenceMemory[LayerState]):
    """Everything that one sequence remembers, in tensors.

    Made by `LanguageModel.new_state`, moved forward by `Decoder.forward`. Not safe to move from two
    threads at once, forks included: they share blocks.

    Attributes:
        layers: its memory of each layer, which may be written again: take a `fork` to keep it.
    """

    def __init__(
        self, config: JambaConfig, dtype: torch.dtype, fingerprint: Callable[[], str]
    ) -> None:
        layers: list[LayerState] = [
            KeyValueState(config.num_kv_heads, config.d_head, dtype)
            if spec.mixer == "attention"
            else MambaState(
                torch.zeros(config.conv_width - 1, config.d_inner, dtype=dtype),
                torch.zeros(config.d_inner, config.state_size),
            )
            for spec in plan_layers(config)
        ]
        super().__init__(config, dtype, layers)
        self._fingerprint = fingerprint

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

    def read_arrays(self, state: ArrayState) -> None:
        """Take over what a state of the same model remembers in arrays."""
        tensors = {name: torch.from_numpy(array) for name, array in state.arrays().items()}
        for name, tensor in tensors.items():
            if tensor.dtype is torch.uint16:
                tensors[name] = tensor.view(torch.bfloat16)
        self._adopt({"ids": torch.tensor(state.ids, dtype=torch.int32), **tensors})

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        layers: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, KeyValueState):
                fresh = layer.fresh()
                fresh.append(tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"])
                layers.append(fresh)
            else:
                layers.append(
                    MambaState(tensors[f"layers.{index}.conv"], tensors[f"layers.{index}.scan"])
                )
        self.layers = layers
        self._begin_after(tensors["ids"].tolist())
