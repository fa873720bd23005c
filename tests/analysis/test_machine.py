"""What a process took at its peak is its own, not that of the program that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jamba_lm.analysis.machine import peak_memory

MIB = 1 << 20


def test_the_peak_is_that_of_this_process_alone():
    code = "from jamba_lm.analysis.machine import peak_memory; print(peak_memory())"
    # This process holds torch, and more: hundreds of MiB.
    started = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 0 < int(started.stdout) < 60 * MIB < peak_memory()


def test_the_peak_stays_when_the_memory_is_given_back():
    before = peak_memory()
    held = bytearray(b"x") * (before + 64 * MIB)
    assert len(held) > before
    del held
    # Less than was held: the system counts pages a little late.
    assert peak_memory() >= before + 32 * MIB


def test_without_linux_accounts_the_system_is_asked(tmp_path: Path):
    assert peak_memory(tmp_path / "status") > 0
    (tmp_path / "status").write_text("Name: x\n", encoding="ascii")
    assert peak_memory(tmp_path / "status") > 0
