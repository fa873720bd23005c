"""What is read off the processor's description."""

from __future__ import annotations

from pathlib import Path

from jamba_lm.analysis.processor import this_processor

X86 = """\
processor\t: 0
model name\t: Example CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 fma avx512f amx_bf16 somethingelse

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
Features\t: fp asimd asimddp sve
CPU implementer\t: 0x41
"""


def test_name_and_known_features_come_from_the_first_processor(tmp_path: Path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86, encoding="utf-8")
    found = this_processor(path)
    assert found.name == "Example CPU @ 2.00GHz"
    assert found.features == ("avx2", "fma", "avx512f", "amx_bf16")
    assert found.cores >= 1


def test_an_arm_processor_lists_its_features_by_another_name(tmp_path: Path):
    path = tmp_path / "cpuinfo"
    path.write_text(ARM, encoding="utf-8")
    assert this_processor(path).features == ("asimd", "asimddp", "sve")


def test_without_a_description_there_is_an_architecture_and_no_feature(tmp_path: Path):
    found = this_processor(tmp_path / "absent")
    assert found.name
    assert found.features == ()
