"""What generating text asks of a model: to read ids, and to remember them in states.

`LanguageModel` does so for every model and back-end, in tensors; `NativeModel` for those that the
native code reads from a file, without torch.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jamba_lm.config import JambaConfig
from jamba_lm.kernels.native_layers import Floats
from jamba_lm.native_plan import NativePlan
from jamba_lm.quantization.policy import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    Logits = Floats | Tensor


class ReadableModel(Protocol):
    """A model to which ids are given. Its states are those that it made itself.

    Attributes:
        config: what the model is.
    """

    config: JambaConfig

    @property
    def type_name(self) -> str:
        """The type of activations, and of weights that are not packed, as torch names it."""

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised; None when they are not."""

    @property
    def weight_bytes(self) -> int:
        """Size of all weights as they are kept."""

    def new_state(self) -> Any:
        """Return the state of a sequence of which nothing has been read."""

    def require_states(self, states: Sequence[Any]) -> None:
        """Refuse states whose memory this model would not fill, or fill too far.

        Raises:
            InputError: a state was made by a model of other sizes, or in another type.
        """

    def next_logits(
        self, sequences: Sequence[Sequence[int]], states: Sequence[Any] | None = None
    ) -> Logits:
        """Read several sequences and return the logits after their last tokens, [B, V]."""

    def last_logits(
        self,
        sequences: Sequence[Sequence[int]],
        counts: Sequence[int],
        states: Sequence[Any] | None = None,
    ) -> Sequence[Logits]:
        """Read several sequences and return logits [counts_i, V] after the last tokens of each."""

    def step_plan(self) -> NativePlan | str:
        """Return the plan by which few tokens are read in one native call, or why there is none."""
