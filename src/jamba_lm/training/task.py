"""What sets one kind of training run apart from another: where it starts, and what it leaves.

Steps, checkpoints and logs are the same for all of them; see `loop.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jamba_lm.corpus.mixture import MixedPosition
from jamba_lm.data import PackedBatch, Position
from jamba_lm.model.decoder import Decoder
from jamba_lm.training.optimizer import MasterAdamW


class Stream(Protocol):
    """Training batches without end, resumable at any of them."""

    @property
    def position(self) -> Position | MixedPosition:
        """Where the next batch starts."""

    def next(self) -> PackedBatch:
        """Return the next batch and move past it."""


class Text(Protocol):
    """What a run reads."""

    @property
    def fingerprint(self) -> str:
        """A name of the contents, so that a resumed run can tell that it reads the same."""

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of what the validation batches predict."""

    def open_stream(
        self, position: Position | MixedPosition | None, reader: int = 0, readers: int = 1
    ) -> Stream:
        """Start reading training batches at `position`, or from the beginning.

        Args:
            position: of the whole run.
            reader: which of those that share the batches this is.
            readers: how many they are.
        """

    def validation_batches(self) -> Iterator[PackedBatch]:
        """Yield everything that is held out, once."""

    def record(self) -> dict[str, Any]:
        """Describe the text for the record of a run."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from.

    Attributes:
        decoder: its parameters that require a gradient are trained; on the meta device all of
            them are given fresh values.
        text: what is read.
        before_pass: told, before each pass, which decoder takes it and its number, counted over
            the whole run from 0.
        record: what is to be said of it in the record of a run.
    """

    decoder: Decoder
    text: Text
    before_pass: Callable[[Decoder, int], None] | None = None
    record: dict[str, Any] | None = None


class Task(Protocol):
    """A kind of training run.

    Attributes:
        output: the name of what it leaves in its folder.
    """

    @property
    def output(self) -> str:
        """The name of the folder that `export` fills, within that of the run."""

    def start(self, cache: Path) -> Start:
        """Make what the run starts from.

        Args:
            cache: folder to keep tokenized text in.
        """

    def export(self, optimizer: MasterAdamW, folder: Path) -> None:
        """Write what the run was for into `folder`."""
