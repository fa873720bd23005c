"""What this machine's processor is and which instruction sets it has. Needs no torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")

# Of the many flags of a processor, those that a kernel of ours or of torch looks for.
FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor, as far as arithmetic is concerned.

    Attributes:
        name: what its maker calls it; the architecture where nobody says.
        cores: logical ones this process may use.
        features: those of FEATURES that it has, in that order.
    """

    name: str
    cores: int
    features: tuple[str, ...]


def this_processor(cpu_info: Path = CPU_INFO) -> Processor:
    """Describe the processor that this process runs on.

    Args:
        cpu_info: where Linux tells; elsewhere the name is the architecture and no feature is known.
    """
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Another operating system: the kernels ask the processor themselves, this is for people.
        text = ""
    first = {
        key.strip(): value.strip()
        for key, colon, value in (
            line.partition(":") for line in text.partition("\n\n")[0].splitlines()
        )
        if colon
    }
    flags = set(first.get("flags", first.get("Features", "")).split())
    return Processor(
        name=first.get("model name") or platform.machine() or "unknown",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _count(),
        features=tuple(feature for feature in FEATURES if feature in flags),
    )


def _count() -> int:
    return os.cpu_count() or 1
