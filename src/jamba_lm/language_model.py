"""The model as a user of the library holds it: ids in, logits out, state beside it.

Knows checkpoints and the decoder; does not know text or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.checkpoint.huggingface import as_dtype, read_decoder, write_decoder
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.kernels import ops
from jamba_lm.model.batch import Batch
from jamba_lm.model.decoder import Decoder
from jamba_lm.model.initialization import initialize
from jamba_lm.model.state import SequenceState

# Bytes taken from each tensor, spread over it, for the fingerprint: all of a small tensor, and
# enough of a large one that no training step leaves them as they were.
FINGERPRINT_SAMPLES = 1024


class LanguageModel:
    """A Jamba model: `logits` for lists of token ids, and states that remember sequences.

    Attributes:
        config: what the model is.
        decoder: the `torch.nn.Module`.
        backend: the kernel back-end asked for by name, or None for the fastest that can.
    """

    def __init__(
        self, config: JambaConfig, decoder: Decoder, *, backend: str | None = None
    ) -> None:
        """Hold a decoder whose parameters are filled.

        Raises:
            BackendUnavailable: `backend` is unknown or cannot run here.
        """
        ops.require(backend)
        self.config = config
        self.decoder = decoder
        self.backend = backend

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations (decays and states stay float32)."""
        return self.decoder.embedding.weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config, the dtype and a sample of every weight, as hexadecimal digits.

        It tells apart models, and training steps of one model; it is no proof against someone who
        changes single weights on purpose. It is taken once: make a new `LanguageModel` after
        changing weights.
        """
        digest = sha256(repr(self.config).encode())
        for name, parameter in self.decoder.named_parameters():
            flat = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            sample = flat[:: max(1, len(flat) // FINGERPRINT_SAMPLES)].contiguous()
            digest.update(sample.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def new_state(self) -> SequenceState:
        """Return the state of a sequence of which nothing has been read."""
        return SequenceState(self.config, self.dtype, lambda: self.fingerprint)

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceState] | None = None,
    ) -> list[Tensor]:
        """Read several sequences and return the logits after each of their tokens.

        Args:
            sequences: lists of token ids, of any lengths, none of them empty.
            states: one state per sequence, which it continues and moves forward in place; None
                starts every sequence afresh.

        Returns:
            One float32 tensor [T_i, V] per sequence.

        Raises:
            InputError: no sequence, an empty one, an id out of range, or states that do not match.
        """
        ids_M, batch = self._batch(sequences, states)
        with torch.no_grad():
            logits_MV = self.decoder(ids_M, batch)
        return list(logits_MV.split(batch.lengths))

    def next_logits(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceState] | None = None,
    ) -> Tensor:
        """Read several sequences and return the logits after their last tokens, float32 [B, V].

        Arguments and errors are those of `logits`.
        """
        ids_M, batch = self._batch(sequences, states)
        with torch.no_grad():
            return self.decoder(ids_M, batch, rows="last")

    def save(self, path: str | Path) -> None:
        """Write a folder in Hugging Face's layout: config.json and safetensors."""
        write_decoder(Path(path), self.config, self.decoder)

    def _batch(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceState] | None,
    ) -> tuple[Tensor, Batch]:
        batch = Batch.of([len(ids) for ids in sequences], states, self.backend)
        try:
            ids_M = torch.tensor([one for ids in sequences for one in ids], dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as wrong:
            raise InputError(
                f"token ids must be integers ({wrong}): expected a list of lists of ids"
            ) from wrong
        wrong_row = torch.nonzero((ids_M < 0) | (ids_M >= self.config.vocab_size))
        if len(wrong_row):
            raise InputError(
                f"token id {int(ids_M[wrong_row[0, 0]])} is out of range: "
                f"expected 0..{self.config.vocab_size - 1}; is this the model's tokenizer?"
            )
        return ids_M, batch


def load(
    path: str | Path, dtype: str | torch.dtype = "auto", backend: str | None = None
) -> LanguageModel:
    """Load a checkpoint folder in Hugging Face's layout.

    Args:
        path: a folder with config.json and safetensors.
        dtype: "auto" keeps that of the file; "fp32", "bf16", "fp16" or a torch dtype converts.
        backend: kernel back-end to use, by name; None takes the fastest that can.

    Raises:
        CheckpointError: no checkpoint there, or one that does not fit its config.
        ConfigError: config.json is not a Jamba config.
        InputError: `dtype` is unknown.
        BackendUnavailable: `backend` was named and cannot run here.
    """
    ops.require(backend)
    config, decoder = read_decoder(Path(path), dtype)
    return LanguageModel(config, decoder, backend=backend)


def from_config(
    config: JambaConfig,
    seed: int = 0,
    dtype: str | torch.dtype = "fp32",
    backend: str | None = None,
) -> LanguageModel:
    """Make a model with fresh random weights, the same for the same seed.

    Raises:
        InputError: `dtype` is unknown.
        BackendUnavailable: `backend` was named and cannot run here.
    """
    ops.require(backend)
    with torch.device("meta"):
        decoder = Decoder(config)
    initialize(decoder, seed, as_dtype(dtype))
    return LanguageModel(config, decoder, backend=backend)


def load_state(path: str | Path, model: LanguageModel) -> SequenceState:
    """Load a state that `SequenceState.save` wrote.

    Raises:
        StateError: the file is missing, cut short, altered, not a state, or of another model.
    """
    state = model.new_state()
    state.restore(path)
    return state


def embedded_model_path() -> Path:
    """Return the folder of the small model that is part of the package."""
    return Path(__file__).parent / "embedded"
