"""Questions to llama.cpp: tokens, logits, continuations, and values stored in its types.

Builds `llama_cpp_probe.cpp` against a built llama.cpp, outside the repository.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.llama_cpp import LlamaCpp, cache_folder

SOURCE = Path(__file__).with_suffix(".cpp")


class Probe:
    """The probe program, built and ready."""

    def __init__(self, llama: LlamaCpp) -> None:
        self._program = cache_folder() / f"llama_cpp_probe-{SOURCE.stat().st_mtime_ns}"
        if self._program.exists():
            return
        self._program.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{llama.source / folder}" for folder in ("include", "ggml/include")]
        libraries = [f"-L{llama.programs}", "-lllama", "-lggml", "-lggml-base"]
        unfinished = self._program.with_suffix(".part")
        build = ["c++", "-O2", "-std=c++17", *includes, str(SOURCE), *libraries]
        build += [f"-Wl,-rpath,{llama.programs}", "-o", str(unfinished)]
        subprocess.run(build, check=True)
        unfinished.rename(self._program)

    def _ask(self, *arguments: object, data: bytes) -> bytes:
        command = [str(self._program), *map(str, arguments)]
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    def tokens(
        self, model: Path, texts: Sequence[str], *, special: bool = False
    ) -> list[list[int]]:
        """Return the ids of texts, no BOS; `special` lets them name control tokens."""
        data = b"".join(_record(np.frombuffer(text.encode(), dtype=np.uint8)) for text in texts)
        found = self._ask(model, "tokenize", int(special), data=data)
        return [ids.tolist() for ids in _records(found, np.int32)]

    def logits(self, model: Path, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits after each token of each sequence, float32 [T, V]."""
        found = _records(self._ask(model, "logits", data=_ids(sequences)), np.float32)
        return [
            torch.from_numpy(values).unflatten(0, (len(ids), -1))
            for ids, values in zip(sequences, found, strict=True)
        ]

    def greedy(self, model: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Continue prompts by the likeliest token each time."""
        found = self._ask(model, "greedy", count, data=_ids(prompts))
        return [ids.tolist() for ids in _records(found, np.int32)]

    def blocks(self, code: int, values: Tensor) -> tuple[bytes, Tensor]:
        """Store values [rows, columns] in a type of ggml; return the bytes, and what they say."""
        data = _record(values.flatten().numpy())
        found = self._ask(code, "blocks", values.shape[-1], data=data)
        size = struct.unpack_from("<I", found)[0]
        packed, rest = found[4 : 4 + size], found[4 + size :]
        (said,) = _records(rest, np.float32)
        return packed, torch.from_numpy(said).view(values.shape)


def _ids(sequences: Sequence[Sequence[int]]) -> bytes:
    return b"".join(_record(np.array(ids, dtype=np.int32)) for ids in sequences)


def _record(values: NDArray[Any]) -> bytes:
    return struct.pack("<I", len(values)) + values.tobytes()


def _records(data: bytes, dtype: Any) -> list[NDArray[Any]]:
    found, at = [], 0
    while at < len(data):
        count = struct.unpack_from("<I", data, at)[0]
        values = np.frombuffer(data, dtype=dtype, count=count, offset=at + 4)
        found.append(values.copy())
        at += 4 + values.nbytes
    return found
