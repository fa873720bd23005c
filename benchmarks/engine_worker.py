"""A process that holds one model in one engine and does what it is told: one line, one answer.

    python -m benchmarks.engine_worker ENGINE FOLDER TYPE THREADS

Each line on stdin is a JSON object with a "do" and its arguments; each answer is a line of JSON on
stdout. It is a process of its own so that its memory and its start are those of its engine alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from jamba_lm.analysis.machine import peak_memory

# What the model reads; any text would do, for none of it is looked at.
SEED = 0


class Engine(Protocol):
    """What both engines can do."""

    vocab_size: int

    def start(self, batch: int) -> Any:
        """Return the states of so many sequences that have read nothing."""

    def step(self, state: Any, ids: list[list[int]]) -> tuple[Tensor, Any]:
        """Read tokens of every sequence; return the logits after the last ones, and the states."""

    def write(self, state: Any, picked: list[int], tokens: int) -> None:
        """Go on with so many tokens, the likeliest each time, after those picked last."""

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits after each of the tokens, [T, V]."""


class JambaEngine:
    """This project."""

    def __init__(self, folder: str, weights: str) -> None:
        from benchmarks.our_model import open_model
        from jamba_lm.stepper import Stepper

        self.stepper = Stepper
        self.model = open_model(folder, weights)
        self.vocab_size = self.model.config.vocab_size

    def start(self, batch: int) -> Any:
        """Return fresh states."""
        return [self.model.new_state() for _ in range(batch)]

    def step(self, state: Any, ids: list[list[int]]) -> tuple[Tensor, Any]:
        """Read tokens; the states move in place."""
        return self.model.next_logits(ids, state), state

    def write(self, state: Any, picked: list[int], tokens: int) -> None:
        """Write as `jamba_lm.generate` does."""
        stepper = self.stepper(self.model)
        for _ in range(tokens):
            logits = stepper.read([[token] for token in picked], [1] * len(picked), state)
            picked = [int(logits_V.argmax()) for (logits_V,) in logits]

    def logits(self, ids: list[int]) -> Tensor:
        """Read a whole prompt."""
        return self.model.logits([ids])[0]


class TransformersEngine:
    """transformers' Jamba, eager, as it comes."""

    def __init__(self, folder: str, weights: str) -> None:
        import transformers

        logs: Any = transformers.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        self.model: Any = transformers.JambaForCausalLM.from_pretrained(folder, dtype=dtype)
        self.vocab_size = int(self.model.config.vocab_size)

    def start(self, batch: int) -> Any:
        """Return no cache: transformers makes one at the first call."""
        return None

    def step(self, state: Any, ids: list[list[int]]) -> tuple[Tensor, Any]:
        """Read tokens with its cache."""
        out = self.model(
            input_ids=torch.tensor(ids), past_key_values=state, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].float(), out.past_key_values

    def write(self, state: Any, picked: list[int], tokens: int) -> None:
        """Write step by step, which is what its `generate` does and more."""
        for _ in range(tokens):
            logits, state = self.step(state, [[token] for token in picked])
            picked = logits.argmax(-1).tolist()

    def logits(self, ids: list[int]) -> Tensor:
        """Read a whole prompt, which is what transformers does right."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


ENGINES: dict[str, Callable[[str, str], Engine]] = {
    "jamba": JambaEngine,
    "transformers": TransformersEngine,
}


def random_ids(vocab_size: int, batch: int, tokens: int) -> list[list[int]]:
    """Return the same random prompts every time."""
    draw = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (batch, tokens), generator=draw).tolist()


def prefill(engine: Engine, tokens: int, batch: int) -> dict[str, Any]:
    """Time reading a prompt, in the calls that the engine makes of it."""
    prompts = random_ids(engine.vocab_size, batch, tokens)
    state = engine.start(batch)
    # transformers loses its scan state when a prompt comes in pieces, so it must read it whole.
    piece = 512 if isinstance(engine, JambaEngine) else tokens
    started = time.perf_counter()
    for first in range(0, tokens, piece):
        logits, state = engine.step(state, [ids[first : first + piece] for ids in prompts])
    logits.argmax(-1).tolist()
    return {"seconds": time.perf_counter() - started}


def decode(engine: Engine, prompt: int, tokens: int, batch: int) -> dict[str, Any]:
    """Time writing after a short prompt, the likeliest token each time."""
    state = engine.start(batch)
    logits, state = engine.step(state, random_ids(engine.vocab_size, batch, prompt))
    picked = logits.argmax(-1).tolist()
    started = time.perf_counter()
    engine.write(state, picked, tokens)
    return {"seconds": time.perf_counter() - started}


def greedy(engine: Engine, ids: list[int], tokens: int) -> dict[str, Any]:
    """Continue a prompt with the likeliest token each time."""
    state = engine.start(1)
    logits, state = engine.step(state, [ids])
    picked = [int(logits[0].argmax())]
    while len(picked) < tokens:
        logits, state = engine.step(state, [[picked[-1]]])
        picked.append(int(logits[0].argmax()))
    return {"ids": picked}


def save_logits(engine: Engine, ids: list[int], out: str) -> dict[str, Any]:
    """Write the logits after each token to a file of safetensors."""
    from jamba_lm.tensor_file import write_tensors

    write_tensors(out, {"logits": engine.logits(ids).contiguous()}, {})
    return {}


def memory(engine: Engine) -> dict[str, Any]:
    """Return the most memory this process has had."""
    return {"peak_bytes": peak_memory()}


DEEDS: dict[str, Callable[..., dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "greedy": greedy,
    "logits": save_logits,
    "memory": memory,
}


def commands() -> Iterator[dict[str, Any]]:
    """Yield the commands until stdin ends."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Open the model and obey."""
    name, folder, weights, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    engine = ENGINES[name](folder, weights)
    with torch.inference_mode():
        for command in commands():
            deed = DEEDS[command.pop("do")]
            print(json.dumps(deed(engine, **command)), flush=True)


if __name__ == "__main__":
    main()
