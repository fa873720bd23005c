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

from jamba_lm.checkpoint.adapter import merge_into
from jamba_lm.checkpoint.adapter_reader import read_adapter
from jamba_lm.checkpoint.gguf_reader import read_gguf_decoder
from jamba_lm.checkpoint.huggingface import as_dtype, read_decoder, write_decoder
from jamba_lm.checkpoint.packed_reader import (
    pack_while_reading,
    read_packed_decoder,
    refuse_packed,
    stored_scheme,
)
from jamba_lm.checkpoint.packed_writer import write_packed_decoder
from jamba_lm.config import JambaConfig
from jamba_lm.errors import InputError
from jamba_lm.gguf_file import is_gguf
from jamba_lm.kernels import ops
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.model.batch import Batch
from jamba_lm.model.call_arguments import require_ids
from jamba_lm.model.decoder import Decoder, Rows
from jamba_lm.model.initialization import initialize
from jamba_lm.model.state import SequenceState
from jamba_lm.prefill import prefill
from jamba_lm.quantization.policy import Scheme, find_scheme
from jamba_lm.quantization.rewrite import (
    PlainWeights,
    quantize_decoder,
    scheme_of,
    stored_tensors,
    use_backend,
)
from jamba_lm.step_plan import StepPlan, why_not_plan

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
        use_backend(decoder, backend)
        self._plan: StepPlan | str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and of weights that are not packed (decays stay float32)."""
        return self.decoder.final_norm.weight.dtype

    @property
    def type_name(self) -> str:
        """The name of `dtype`, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised; None when they are not."""
        return scheme_of(self.decoder)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights as they are kept."""
        return sum(tensor.nbytes for _, tensor in stored_tensors(self.decoder))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config, the dtype and a sample of every weight, as hexadecimal digits.

        It tells apart models, and training steps of one model; it is no proof against someone who
        changes single weights on purpose. It is taken once: make a new `LanguageModel` after
        changing weights.
        """
        digest = sha256(repr(self.config).encode())
        for name, tensor in stored_tensors(self.decoder):
            flat = tensor.detach().flatten()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            sample = flat[:: max(1, len(flat) // FINGERPRINT_SAMPLES)].contiguous()
            digest.update(sample.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def new_state(self) -> SequenceState:
        """Return the state of a sequence of which nothing has been read."""
        return SequenceState(self.config, self.dtype, lambda: self.fingerprint)

    def require_states(self, states: Sequence[SequenceState]) -> None:
        """Refuse states whose memory this model would not fill, or fill too far.

        Raises:
            InputError: a state was made by a model of other sizes, or in another type.
        """
        for index, state in enumerate(states):
            if not state.fits(self.config, self.dtype):
                raise InputError(
                    f"state {index} was made for a model of other sizes or of another type than "
                    f"{self.dtype}: start with this model's new_state()"
                )

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
        logits_MV = self._read(ids_M, batch, "all")
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
        return self._read(ids_M, batch, "last")

    def last_logits(
        self,
        sequences: Sequence[Sequence[int]],
        counts: Sequence[int],
        states: Sequence[SequenceState] | None = None,
    ) -> list[Tensor]:
        """Read several sequences and return the logits after the last few tokens of each.

        Args:
            sequences: as for `logits`.
            counts: after how many of its last tokens, for each sequence.
            states: as for `logits`.

        Returns:
            One float32 tensor [counts_i, V] per sequence.
        """
        ids_M, batch = self._batch(sequences, states)
        assert len(counts) == len(batch.lengths)
        ends = batch.offsets[1:].tolist()
        wanted = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        logits = self._read(ids_M, batch, torch.cat(wanted))
        return list(logits.split(list(counts)))

    def save(self, path: str | Path, *, dequantize: bool = False) -> None:
        """Write a folder in Hugging Face's layout: config.json and safetensors.

        A quantised model is written as it is, and only this project reads it.

        Args:
            path: where to.
            dequantize: write what packed matrices stand for, in the model's dtype, so that other
                programs can read it.

        Raises:
            InputError: the folder may not be written.
        """
        scheme = self.scheme
        if scheme is None:
            write_decoder(Path(path), self.config, self.decoder)
        elif dequantize:
            weights = PlainWeights(self.decoder)
            write_decoder(Path(path), self.config, weights, dtype=self.dtype)
        else:
            write_packed_decoder(Path(path), self.config, self.decoder, scheme)

    def why_not_step(self) -> str | None:
        """Say why few tokens are read module by module, or None when one native call reads them."""
        plan = self.step_plan()
        return plan if isinstance(plan, str) else None

    def step_plan(self) -> StepPlan | str:
        """Return the plan by which few tokens are read in one native call, or why there is none."""
        if isinstance(self._plan, StepPlan) and not self._plan.is_current:
            self._plan = None
        if self._plan is None:
            reason = why_not_plan(self.decoder, self.backend)
            self._plan = StepPlan(self.config, self.decoder) if reason is None else reason
        return self._plan

    def _read(self, ids_M: Tensor, batch: Batch, rows: Rows) -> Tensor:
        """Return the logits after `rows`, float32, by native calls where that can be."""
        plan = self.step_plan()
        if isinstance(plan, StepPlan):
            states = batch.states or [self.new_state() for _ in batch.lengths]
            sequences = [ids_M[first:end].tolist() for first, end in batch.spans()]
            if batch.num_rows <= STEP_ROWS:
                logits = plan.run(sequences, states, batch.numbers_of(rows))
            else:
                logits = prefill(plan, sequences, states, batch.numbers_of(rows))
            return torch.from_numpy(logits)
        with torch.no_grad():
            return self.decoder(ids_M, batch, rows=rows)

    def _batch(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[SequenceState] | None,
    ) -> tuple[Tensor, Batch]:
        batch = Batch.of([len(ids) for ids in sequences], states, self.backend)
        self.require_states(batch.states or ())
        flat = require_ids([one for ids in sequences for one in ids], self.config.vocab_size)
        ids_M = torch.tensor(flat, dtype=torch.int64)
        return ids_M, batch


def load(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    backend: str | None = None,
    quantize: str | Scheme | None = None,
    adapter: str | Path | None = None,
) -> LanguageModel:
    """Load a checkpoint folder in Hugging Face's layout, quantised or not, or a GGUF file.

    Args:
        path: a folder with config.json and safetensors, or a file whose name ends in .gguf.
        dtype: "auto" keeps that of the file, and takes bfloat16 for a quantised GGUF file;
            "fp32", "bf16", "fp16" or a torch dtype converts. Of a quantised model, it is the type
            of all else.
        backend: kernel back-end to use, by name; None takes the fastest that can.
        quantize: pack the weights while they are read, by "experts-int8", "int8",
            "experts-int4" or "int4".
        adapter: a folder in PEFT's format, whose changes are added to the weights; before they are
            packed, where `quantize` says so.

    Raises:
        CheckpointError: no checkpoint there, or one that does not fit its config; or no sound
            adapter for this model.
        ConfigError: config.json is not a Jamba config.
        InputError: `dtype` or `quantize` is unknown, or the checkpoint is quantised already.
        BackendUnavailable: `backend` was named and cannot run here.
    """
    ops.require(backend)
    if dtype != "auto":
        dtype = as_dtype(dtype)
    scheme = find_scheme(quantize) if isinstance(quantize, str) else quantize
    path = Path(path)
    if is_gguf(path):
        config, decoder = read_gguf_decoder(path, dtype)
        if adapter is not None:
            merge_into(decoder, read_adapter(adapter, config))
        if scheme is not None:
            quantize_decoder(decoder, scheme)
    else:
        config, decoder = _read_folder(path, dtype, scheme, adapter)
    return LanguageModel(config, decoder, backend=backend)


def _read_folder(
    folder: Path, dtype: str | torch.dtype, scheme: Scheme | None, adapter: str | Path | None
) -> tuple[JambaConfig, Decoder]:
    stored = stored_scheme(folder) if folder.is_dir() else None
    if stored is not None:
        if scheme is not None:
            refuse_packed(folder, f"so it cannot be loaded as {scheme.name}")
        if adapter is not None:
            refuse_packed(folder, "so an adapter cannot be added to it")
        config = JambaConfig.load(folder)
        return config, read_packed_decoder(folder, config, stored, dtype)
    if scheme is None or not folder.is_dir():
        config, decoder = read_decoder(folder, dtype)
        if adapter is not None:
            merge_into(decoder, read_adapter(adapter, config))
        return config, decoder
    config = JambaConfig.load(folder)
    found = None if adapter is None else read_adapter(adapter, config)
    return config, pack_while_reading(folder, config, scheme, dtype, adapter=found)


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
