"""What the way to the first token need not import is not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jamba_lm.presets import embedded_model_path

# torch's compiler and what only that needs: as long to import as all the rest.
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_first_token_does_not_wait_for_the_compiler_of_torch(quantize: str | None):
    code = (
        "import sys\n"
        "from jamba_lm import generate, load, load_tokenizer\n"
        f"folder = {str(embedded_model_path())!r}\n"
        f"model, tokenizer = load(folder, quantize={quantize!r}), load_tokenizer(folder)\n"
        "ids = tokenizer.encode('one two three')\n"
        "assert len(list(generate(model, ids, max_new_tokens=2, tokenizer=tokenizer))) == 2\n"
        f"found = [name for name in {COMPILER} if name in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
