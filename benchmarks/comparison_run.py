"""What the parts of the comparison share: the engines, the types of each, and the run itself."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks import llama_cpp
from benchmarks.calibration import Peaks
from benchmarks.our_model import FLOATS, packed_folder
from benchmarks.timing import Stopwatch

ENGINES = ("jamba", "transformers", "llama.cpp")
# What llama.cpp keeps the same weights in: the types that a user would choose between.
LLAMA_TYPES = {
    "fp32": ["F32"],
    "bf16": ["BF16", "F16"],
    "int8": ["Q8_0"],
    "experts-int4": ["Q4_K_M"],
    "int4": ["Q4_K_M"],
}
TYPES = tuple(LLAMA_TYPES)


@dataclass(slots=True)
class Run:
    """What the whole run shares."""

    options: argparse.Namespace
    llama: llama_cpp.LlamaCpp | None
    peaks: Peaks
    watch: Stopwatch

    @property
    def threads(self) -> int:
        """Threads of every engine."""
        return int(self.options.threads)

    def say(self, text: str) -> None:
        """Tell how far the run is, on stderr."""
        self.watch.log(text)


def place_of(engine: str, folder: Path, weights: str) -> tuple[str, Path, str]:
    """Return how a worker is started: the engine, the folder it reads and the type it uses."""
    if engine == "jamba":
        return engine, packed_folder(folder, weights), weights
    return engine, folder, peer_type(weights)


def peer_type(weights: str) -> str:
    """Return what transformers computes in: it has no quantised Jamba, and bf16 is its fastest."""
    return weights if weights in FLOATS else "bf16"
