"""What a sequence remembers, in arrays that only native code reads and writes.

For programs that do without torch.

S tokens remembered, G key/value heads, P head width, C Mamba channels, N state size,
L = convolution taps - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jamba_lm.config import JambaConfig
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.sequence_memory import (
    Block,
    KeyValueChain,
    Loan,
    RecurrentMemory,
    SequenceMemory,
)

Values = NDArray[Any]

# numpy has no such type, and nobody but native code looks at the values.
BFLOAT16 = np.uint16


class ArrayKeys(KeyValueChain[Values]):
    """The keys and values of one attention layer, in blocks of arrays."""

    __slots__ = ("_dtype", "_shape")

    def __init__(self, num_kv_heads: int, d_head: int, dtype: type[np.generic]) -> None:
        super().__init__()
        self._shape = (num_kv_heads, d_head)
        self._dtype = dtype

    def fresh(self) -> ArrayKeys:
        """Return one of the same kind that remembers nothing."""
        return ArrayKeys(*self._shape, self._dtype)

    def arrays(self) -> dict[str, Values]:
        """Return copies of all keys and all values, [S, G, P]."""
        none = np.empty((0, *self._shape), dtype=self._dtype)
        keys = [none, *(block.keys_SGP[:count] for block, count in self._parts())]
        values = [none, *(block.values_SGP[:count] for block, count in self._parts())]
        return {"keys": np.concatenate(keys), "values": np.concatenate(values)}

    def _new_block(self, room: int) -> Block[Values]:
        keys_SGP, values_SGP = (np.empty((room, *self._shape), dtype=self._dtype) for _ in "kv")
        addresses = keys_SGP.ctypes.data, values_SGP.ctypes.data
        return Block(keys_SGP, values_SGP, addresses, room, keys_SGP.nbytes + values_SGP.nbytes)


class ArrayMamba(RecurrentMemory):
    """The memory of one Mamba layer, in arrays, which a step reads and never writes again.

    Attributes:
        conv_LC: the last inputs of the convolution, oldest first, in the model's type.
        scan_CN: the recurrent state, float32 whatever the model's type.
    """

    __slots__ = ("conv_LC", "scan_CN")

    def __init__(self, conv_LC: Values, scan_CN: Values, loan: Loan | None = None) -> None:
        super().__init__(loan)
        self.conv_LC = conv_LC
        self.scan_CN = scan_CN

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the convolution window and the scan state begin."""
        return self.conv_LC.ctypes.data, self.scan_CN.ctypes.data

    @property
    def num_bytes(self) -> int:
        """Bytes of the window and the state."""
        return self.conv_LC.nbytes + self.scan_CN.nbytes

    def blank(self, loan: Loan | None = None) -> ArrayMamba:
        """Return one of the same size in memory of its own, which nobody has written."""
        return ArrayMamba(np.empty_like(self.conv_LC), np.empty_like(self.scan_CN), loan)

    def arrays(self) -> dict[str, Values]:
        """Return the window and the state."""
        self.lend()
        return {"conv": self.conv_LC, "scan": self.scan_CN}

    def _same(self) -> ArrayMamba:
        return ArrayMamba(self.conv_LC, self.scan_CN)


class ArrayState(SequenceMemory[ArrayKeys | ArrayMamba]):
    """Everything that one sequence remembers, in arrays. Made by `NativeModel.new_state`."""

    def __init__(self, config: JambaConfig, dtype: type[np.generic]) -> None:
        """Begin a sequence of which nothing has been read.

        Args:
            config: of the model.
            dtype: of convolution windows, keys and values; `BFLOAT16` for that type.
        """
        layers: list[ArrayKeys | ArrayMamba] = [
            ArrayKeys(config.num_kv_heads, config.d_head, dtype)
            if spec.mixer == "attention"
            else ArrayMamba(
                np.zeros((config.conv_width - 1, config.d_inner), dtype=dtype),
                np.zeros((config.d_inner, config.state_size), dtype=np.float32),
            )
            for spec in plan_layers(config)
        ]
        super().__init__(config, dtype, layers)

    def arrays(self) -> dict[str, Values]:
        """Return what it remembers, by the names under which states are saved."""
        return {
            f"layers.{index}.{name}": array
            for index, layer in enumerate(self.layers)
            for name, array in layer.arrays().items()
        }
