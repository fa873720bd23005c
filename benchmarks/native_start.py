"""A first token, or a whole prompt, in a process that never imports torch: as `jamba generate`.

    python -m benchmarks.native_start FOLDER --threads 2 --prompt-tokens 16 --new-tokens 1

Prints one JSON object: the tokens written, and the most memory that the process had.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jamba_lm.analysis.machine import peak_memory
from jamba_lm.generation import generate
from jamba_lm.native_model import load_native

# The tokens before are control tokens.
FIRST_ID = 2


def main() -> None:
    """Load, read, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()
    model = load_native(options.folder, options.threads)
    usual = model.config.vocab_size - FIRST_ID
    ids = [FIRST_ID + number % usual for number in range(options.prompt_tokens)]
    written = [token.id for token in generate(model, ids, max_new_tokens=options.new_tokens)]
    if "torch" in sys.modules:
        sys.exit("error: torch was imported, which is what is not to be measured here")
    print(json.dumps({"ids": written, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    main()
