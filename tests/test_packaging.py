"""What `pip install .` gives, with a C++ compiler and without one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
LIBRARY = "jamba_lm/kernels/libjamba_kernels.so"


def build_wheel(folder: Path, **environment: str) -> Path:
    # Without isolation: the pinned build tools are here, and tests have no network.
    options = "--no-deps --no-index --no-build-isolation --wheel-dir"
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), *options.split(), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("plain"), **NO_COMPILER)


def test_the_wheel_fits_every_python(plain_wheel):
    assert plain_wheel.name.startswith("jamba_lm-")
    assert "-py3-none-" in plain_wheel.name


def test_without_a_compiler_the_wheel_is_whole_but_for_the_kernels(plain_wheel):
    with zipfile.ZipFile(plain_wheel) as wheel:
        names = set(wheel.namelist())
    sources = {
        f"jamba_lm/{path.relative_to(ROOT / 'src' / 'jamba_lm').as_posix()}"
        for path in (ROOT / "src" / "jamba_lm").rglob("*.py")
    }
    assert sources <= names
    assert "jamba_lm/embedded/model.safetensors" in names
    assert LIBRARY not in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_without_a_compiler_the_command_works_and_doctor_says_why(plain_wheel, tmp_path):
    with zipfile.ZipFile(plain_wheel) as wheel:
        wheel.extractall(tmp_path)
    code = "import sys; from jamba_lm.cli.main import main; sys.exit(main())"

    def jamba(*arguments: str) -> subprocess.CompletedProcess[str]:
        # -S: the editable install of a checkout hooks imports, and would come before the wheel.
        packages = sysconfig.get_paths()["purelib"]
        return subprocess.run(
            [sys.executable, "-S", "-P", "-c", code, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), packages])},
            capture_output=True,
            text=True,
        )

    doctor = jamba("doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert "libjamba_kernels.so was not built" in doctor.stdout
    text = jamba(
        "generate", "demo", "--prompt", "The", "--max-tokens", "2", "--backend", "reference"
    )
    assert text.returncode == 0, text.stderr
    refused = jamba("generate", "demo", "--prompt", "The", "--backend", "native")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_with_a_compiler_the_wheel_holds_the_kernels(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        assert LIBRARY in wheel.namelist()
