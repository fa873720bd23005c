"""A checkpoint that native code reads where it lies: no module is made of it, and torch stays out.

Importing torch takes longer than to load a model and let it answer. What a checkpoint needs to be
read so is that nothing about it is unusual; `open_native` says why it is not, and `LanguageModel`
then opens it, or finds the words for what is wrong with it.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from jamba_lm.checkpoint.mapped_weights import MappedWeights, UnusualCheckpoint, map_weights
from jamba_lm.config import JambaConfig, read_config_json
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.gguf_file import is_gguf
from jamba_lm.kernels.choice import requested_backend
from jamba_lm.kernels.library import default_threads, find_library
from jamba_lm.kernels.native_layers import Floats, StepModel
from jamba_lm.kernels.native_step import STEP_ROWS
from jamba_lm.model.array_state import BFLOAT16, ArrayState
from jamba_lm.model.call_arguments import require_ids, require_sequences
from jamba_lm.model.layout import plan_layers
from jamba_lm.native_plan import NativePlan
from jamba_lm.prefill import prefill
from jamba_lm.quantization.policy import read_scheme
from jamba_lm.step_description import LayerShape, describe_model


class NativeModel:
    """A model that only native code runs, read from a checkpoint folder.

    It gives the same bits as `LanguageModel` of the same folder, in arrays, and its states are for
    generating alone: they are not saved, and no gradient goes through them.

    Attributes:
        config: what the model is.
        type_name: the type of activations, and of weights that are not packed.
        scheme: how the weights are quantised; None when they are not.
        weight_bytes: size of all weights as they are kept.
    """

    def __init__(self, config: JambaConfig, weights: MappedWeights, threads: int) -> None:
        """Describe the model that `weights` are all of.

        Args:
            config: what it is.
            weights: in the files that they lie in.
            threads: to compute with.
        """
        self.config = config
        self.type_name = "bfloat16" if weights.bfloat16 else "float32"
        self.scheme = weights.scheme
        self.weight_bytes = weights.num_bytes
        self._dtype: type[np.generic] = BFLOAT16 if weights.bfloat16 else np.float32
        layers = [
            LayerShape(
                attends=layer.mixer == "attention",
                experts=config.num_experts if layer.feed_forward == "moe" else 0,
            )
            for layer in plan_layers(config)
        ]
        model = describe_model(
            config, layers, weights, tied=config.tie_embeddings, bfloat16=weights.bfloat16
        )
        self._plan = _FilePlan(model, threads)

    def new_state(self) -> ArrayState:
        """Return the state of a sequence of which nothing has been read."""
        return ArrayState(self.config, self._dtype)

    def require_states(self, states: Sequence[ArrayState]) -> None:
        """Refuse states whose memory this model would not fill, or fill too far.

        Raises:
            InputError: a state was made by a model of other sizes, or in another type.
        """
        for index, state in enumerate(states):
            if not state.fits(self.config, self._dtype):
                raise InputError(
                    f"state {index} was made for a model of other sizes or of another type: start "
                    "with this model's new_state()"
                )

    def step_plan(self) -> NativePlan:
        """Return the plan by which tokens are read."""
        return self._plan

    def next_logits(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[ArrayState] | None = None,
    ) -> Floats:
        """Read several sequences and return the logits after their last tokens, [B, V].

        Args:
            sequences: lists of token ids, of any lengths, none of them empty.
            states: one state per sequence, which it continues and moves forward in place; None
                starts every sequence afresh.

        Raises:
            InputError: no sequence, an empty one, an id out of range, or states that do not match.
        """
        ends = accumulate(len(ids) for ids in sequences)
        return self._read(sequences, states, [end - 1 for end in ends])

    def last_logits(
        self,
        sequences: Sequence[Sequence[int]],
        counts: Sequence[int],
        states: Sequence[ArrayState] | None = None,
    ) -> list[Floats]:
        """Read several sequences and return the logits after the last few tokens of each.

        Args:
            sequences: as for `next_logits`.
            counts: after how many of its last tokens, for each sequence.
            states: as for `next_logits`.

        Returns:
            An array [counts_i, V] per sequence.
        """
        ends = accumulate(len(ids) for ids in sequences)
        rows = [
            row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)
        ]
        logits = self._read(sequences, states, rows)
        return np.split(logits, list(accumulate(counts))[:-1])

    def _read(
        self,
        sequences: Sequence[Sequence[int]],
        states: Sequence[ArrayState] | None,
        rows: list[int],
    ) -> Floats:
        # Native code takes what it is given at its word.
        require_sequences([len(ids) for ids in sequences], states)
        require_ids([one for ids in sequences for one in ids], self.config.vocab_size)
        states = [self.new_state() for _ in sequences] if states is None else states
        self.require_states(states)
        if sum(map(len, sequences)) <= STEP_ROWS:
            return self._plan.run(sequences, states, rows)
        return prefill(self._plan, sequences, states, rows)


class _FilePlan(NativePlan):
    def __init__(self, model: StepModel, threads: int) -> None:
        super().__init__(model)
        self._threads = threads

    @property
    def threads(self) -> int:
        return self._threads


def open_native(
    folder: Path, *, backend: str | None = None, threads: int | None = None
) -> NativeModel | str:
    """Open a checkpoint folder, quantised or not, in the type that it is stored in.

    Args:
        folder: in Hugging Face's layout.
        backend: the back-end that was asked for by name, if any.
        threads: to compute with; None takes one for each core.

    Returns:
        The model; or why it cannot be read so, which does not mean that anything is wrong.
    """
    if is_gguf(folder) or not folder.is_dir():
        return "it is no folder"
    if (backend or requested_backend() or "native") != "native":
        return "another back-end was asked for"
    library = find_library()
    if isinstance(library, str):
        return library
    threads = default_threads(library) if threads is None else threads
    try:
        return _read(folder, threads)
    except (UnusualCheckpoint, CheckpointError) as reason:
        return str(reason)


def load_native(path: str | Path, threads: int | None = None) -> NativeModel:
    """Load a checkpoint folder for generating alone, without importing torch.

    >>> from jamba_lm import embedded_model_path, generate
    >>> len(list(generate(load_native(embedded_model_path()), [1, 2, 3], max_new_tokens=4)))
    4

    Args:
        path: a folder in Hugging Face's layout, quantised or not, in float32 or bfloat16.
        threads: to compute with; None takes one for each core.

    Raises:
        InputError: native code alone cannot read it; the message says why, and `jamba_lm.load` can,
            or says what is wrong.
        ConfigError: config.json is not a Jamba config.
    """
    found = open_native(Path(path), threads=threads)
    if isinstance(found, str):
        raise InputError(
            f"{str(path)!r} cannot be read by native code alone ({found}): use jamba_lm.load"
        )
    return found


def _read(folder: Path, threads: int) -> NativeModel:
    config = JambaConfig.load(folder)
    if config.position != "none":
        raise UnusualCheckpoint("its attention knows positions")
    scheme = read_scheme(read_config_json(folder), str(folder))
    return NativeModel(config, map_weights(folder, config, scheme), threads)
