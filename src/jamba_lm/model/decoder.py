"""The whole model: embedding, blocks, final norm, head.

Takes ids of several sequences laid end to end and gives logits or hidden states; it does not know
text, checkpoints, devices or training.

M rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.model.batch import Batch
from jamba_lm.model.block import Block
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.norm import RMSNorm

Rows = Literal["all", "last"] | Tensor


class Decoder(nn.Module):
    """Jamba, in every arm that `JambaConfig` can say.

    Build it under `torch.device("meta")` and let `initialization.initialize` or `checkpoint/` give
    it values: torch's own draws would cost seconds and be thrown away.

    Paper: Jamba §2, Figure 1.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding would draw random values, and to do so on the meta device torch imports its
        # compiler, which takes longer than to load a model.
        values_VD = torch.empty(config.vocab_size, config.d_model)
        self.embedding = nn.Embedding.from_pretrained(values_VD, freeze=False)
        self.blocks = nn.ModuleList(Block(config, spec) for spec in plan_layers(config))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self, ids_M: Tensor, batch: Batch, *, rows: Rows = "all", hidden: bool = False
    ) -> Tensor:
        """Read the tokens of `batch` and return what the model says after the chosen rows.

        States in `batch` move past these tokens together, after the last layer: a call that
        fails or is interrupted leaves them where they were.

        Args:
            ids_M: token ids, int64, the sequences of `batch` one after the other.
            batch: where the sequences start, and their states.
            rows: "all", the "last" of each sequence, or int64 row numbers among the M.
            hidden: return the normalised hidden states instead of logits.

        Returns:
            Logits, float32 [rows, V], or hidden states [rows, D] in the model's dtype.

        Raises:
            InputError: the number of ids is not what `batch` says.
        """
        if ids_M.shape != (batch.num_rows,):
            raise InputError(
                f"ids have shape {tuple(ids_M.shape)}, "
                f"but the batch describes {batch.num_rows} rows"
            )
        # Layers move copies on; the real states follow only when all of them have.
        moved = None if batch.states is None else [state.fork() for state in batch.states]

        x_MD = self.embedding(ids_M)
        for index, block in enumerate(self.blocks):
            layer = None if moved is None else [state.layers[index] for state in moved]
            x_MD = block(x_MD, batch, layer)

        if batch.states is not None and moved is not None:
            ids = ids_M.tolist()
            for state, after, (first, end) in zip(batch.states, moved, batch.spans(), strict=True):
                state.move_to(after, ids[first:end])

        if isinstance(rows, Tensor):
            x_MD = x_MD[rows]
        elif rows == "last":
            x_MD = x_MD[batch.offsets[1:] - 1]
        x_MD = self.final_norm(x_MD, batch)
        return x_MD if hidden else self.logits(x_MD)

    def logits(self, x: Tensor) -> Tensor:
        """Return the float32 logits (..., V) of hidden states (..., D) after the final norm."""
        if self.head is None:
            return F.linear(x, self.embedding.weight).float()
        return self.head(x).float()
