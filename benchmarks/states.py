"""What it costs to fork, snapshot, rewind, save and load what a sequence remembers.

    python -m benchmarks.states [--tokens 1000,10000,100000] [--shape 3b] [--json]

The states belong to a model of the given preset, which is not built: keys and values are filled in
directly, as reading that many tokens would. Sharing is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jamba_lm.config import JambaConfig
from jamba_lm.model.state import KeyValueState, SequenceState
from jamba_lm.presets import preset

MIB = 1024**2


def filled_state(config: JambaConfig, num_tokens: int) -> SequenceState:
    """Return the state of a bfloat16 model that has read `num_tokens` tokens."""
    state = SequenceState(config, torch.bfloat16, lambda: "benchmark")
    k_TGP = torch.zeros(num_tokens, config.num_kv_heads, config.d_head, dtype=torch.bfloat16)
    after = state.fork()
    for layer in after.layers:
        if isinstance(layer, KeyValueState):
            layer.append(k_TGP, k_TGP)
    state.move_to(after, [0] * num_tokens)
    return state


def check_sharing(state: SequenceState) -> None:
    """Fail when a fork holds a copy of any key."""
    for ours, theirs in zip(state.layers, state.fork().layers, strict=True):
        if isinstance(ours, KeyValueState) and isinstance(theirs, KeyValueState):
            for one, other in zip(ours.key_blocks(), theirs.key_blocks(), strict=True):
                assert one.data_ptr() == other.data_ptr(), "a fork copied keys"


def median_ms(action: Callable[[], object], repeats: int) -> float:
    """Return the median time of `action` in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(config: JambaConfig, num_tokens: int) -> dict[str, float]:
    """Time every operation on a state of this many tokens."""
    state = filled_state(config, num_tokens)
    check_sharing(state)
    point = state.snapshot()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        save = median_ms(lambda: state.save(path), 3)
        file_bytes = path.stat().st_size
        load = median_ms(lambda: filled_state(config, 0).restore(path), 3)
    return {
        "tokens": num_tokens,
        "bytes": state.num_bytes,
        "file_bytes": file_bytes,
        "fork_ms": median_ms(state.fork, 50),
        "snapshot_ms": median_ms(state.snapshot, 50),
        "rewind_ms": median_ms(lambda: state.rewind(point), 20),
        "save_ms": save,
        "load_ms": load,
    }


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="1000,10000,100000", help="lengths, with commas")
    parser.add_argument("--shape", default="3b", help="preset whose states are measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    config = preset(arguments.shape)
    rows = [measure(config, int(count)) for count in arguments.tokens.split(",")]
    if arguments.json:
        print(json.dumps({"shape": arguments.shape, "rows": rows}, indent=2))
        return
    print("| tokens | MiB held | fork | snapshot | rewind | save | load |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['tokens']:,} | {row['bytes'] / MIB:.1f} | {row['fork_ms']:.3f} ms "
            f"| {row['snapshot_ms']:.3f} ms | {row['rewind_ms']:.2f} ms "
            f"| {row['save_ms']:.0f} ms | {row['load_ms']:.0f} ms |"
        )


if __name__ == "__main__":
    main()
