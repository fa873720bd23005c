"""Who runs an operation: named means obeyed or refused, unnamed the fastest that can."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels import library, native, native_conv, native_scan, ops, reference
from jamba_lm.kernels.library import LIBRARY_PATH, Library, find_library, loaded_library
from tests.cli.running import ENVIRONMENT
from tests.kernels.scan_cases import PATHS, scan_inputs


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAMBA_BACKEND", raising=False)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_library", lambda: "libjamba_kernels.so was not built")


def test_the_native_library_was_built():
    assert isinstance(find_library(), Library), find_library()
    assert "portable" in PATHS


@pytest.mark.parametrize("operation", sorted(reference.OPERATIONS))
def test_every_back_end_has_every_operation(operation: str):
    for name, module in ops.BACKENDS.items():
        assert operation in module.OPERATIONS, name
        assert callable(getattr(module, operation))
        assert module.method(operation)


def test_unnamed_means_the_fastest():
    assert ops.choose("selective_scan", torch.zeros(1)) is native


def test_named_means_obeyed():
    assert ops.choose("selective_scan", torch.zeros(1), backend="reference") is reference


def test_the_environment_names_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAMBA_BACKEND", "reference")
    assert ops.choose("selective_scan", torch.zeros(1)) is reference
    assert ops.choose("selective_scan", torch.zeros(1), backend="native") is native


@pytest.mark.parametrize(
    "call", [lambda: ops.choose("rms_norm", backend="gup"), lambda: ops.require("gup")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(call):
    with pytest.raises(
        BackendUnavailable, match="no backend 'gup'; choose one of native, reference"
    ):
        call()


def test_without_the_library_the_reference_serves(no_library: None):
    assert ops.choose("selective_scan", torch.zeros(1)) is reference
    ops.require(None)
    inputs = scan_inputs([3])
    y, _ = ops.selective_scan(*inputs.arguments)
    assert torch.equal(y, reference.selective_scan(*inputs.arguments)[0])


def test_without_the_library_naming_it_is_refused_with_the_reason(no_library: None):
    for call in (lambda: ops.require("native"), lambda: ops.choose("rms_norm", backend="native")):
        with pytest.raises(BackendUnavailable, match=r"'native' cannot run.*was not built"):
            call()


def test_a_type_the_kernels_do_not_take_goes_to_the_reference():
    half = scan_inputs([3]).map(torch.Tensor.half)
    y, _ = ops.selective_scan(*replace(half, A=half.A.float()).arguments)
    assert y.dtype is torch.float16
    with pytest.raises(BackendUnavailable, match=r"a tensor is torch\.float16, the kernel takes"):
        ops.selective_scan(*half.arguments, backend="native")


def test_a_tensor_elsewhere_is_refused_with_its_place():
    reason = native.why_not("selective_scan", torch.zeros(1, device="meta"))
    assert reason == "a tensor is on meta, not on the CPU"


def test_a_missing_library_says_how_to_get_it(tmp_path: Path):
    assert "make native" in str(find_library(tmp_path / "libjamba_kernels.so"))


def test_a_damaged_library_says_what_to_do(tmp_path: Path):
    path = tmp_path / "libjamba_kernels.so"
    path.write_bytes(b"\x7fELF but not really")
    assert "does not load" in str(find_library(path))


def test_a_library_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "libjamba_kernels.so"
    shutil.copy(LIBRARY_PATH, path)
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    assert "this package needs 999" in str(find_library(path))


def test_an_instruction_set_that_is_not_here_is_refused():
    with pytest.raises(BackendUnavailable, match="'avx9000' does not run here; choose one of"):
        native_scan.selective_scan(*scan_inputs([3]).arguments, path="avx9000")


def test_torch_and_the_kernels_share_one_openmp():
    loaded_library()
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    runtimes = {line.split()[-1] for line in mapped.splitlines() if "libgomp" in line}
    assert len(runtimes) == 1, runtimes


BAD_OFFSETS = [[0], [0, 4], [1, 5], [0, 3, 3, 5], [0, 6, 5], [0, -1, 5]]


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_offsets_that_do_not_rise_to_the_number_of_rows_are_refused(offsets: list[int]):
    inputs = replace(scan_inputs([5], with_state=False), offsets=torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets must rise strictly from 0 to 5"):
        ops.selective_scan(*inputs.arguments)
    if len(offsets) > 1:
        # The library itself does not rely on that check.
        with pytest.raises(BackendUnavailable, match="offsets must rise strictly"):
            native_scan.selective_scan(*inputs.arguments)


def test_offsets_of_another_type_are_refused():
    inputs = scan_inputs([5])
    with pytest.raises(ValueError, match=r"offsets must be int64.*torch\.int32"):
        ops.selective_scan(*replace(inputs, offsets=inputs.offsets.int()).arguments)


@pytest.mark.parametrize("name", ["u", "dt", "dt_bias", "B", "C", "skip", "state"])
def test_a_tensor_that_is_too_small_is_refused_by_name(name: str):
    inputs = scan_inputs([5])
    small = replace(inputs, **{name: getattr(inputs, name)[..., :-1]})
    with pytest.raises(ValueError, match=f"selective_scan: {name}_.* expected"):
        ops.selective_scan(*small.arguments)


def test_a_convolution_state_of_another_shape_or_type_is_refused():
    x, weight, offsets = torch.randn(5, 8), torch.randn(8, 4), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"state_BLC has shape \(1, 4, 8\), expected \(1, 3, 8\)"):
        ops.causal_conv(x, weight, None, offsets, torch.zeros(1, 4, 8), silu=True)
    state = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"the state is torch\.bfloat16, the input torch\.float32"):
        ops.causal_conv(x, weight, None, offsets, state, silu=True)


def test_a_convolution_that_is_too_wide_is_refused():
    x, weight, offsets = torch.randn(5, 8), torch.randn(8, 9), torch.tensor([0, 5])
    with pytest.raises(BackendUnavailable, match="the convolution takes 1 to 8 taps"):
        native_conv.causal_conv(x, weight, None, offsets, silu=True)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_gain_or_a_gate_that_does_not_fit_the_rows_is_refused(backend: str):
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight_D has shape \(7,\), expected \(8,\)"):
        ops.rms_norm(x, torch.ones(7), 1e-6, backend=backend)
    with pytest.raises(ValueError, match=r"silu_gate: gate has shape \(2, 8\), expected \(3, 8\)"):
        ops.silu_gate(x, torch.randn(2, 8), backend=backend)
    with pytest.raises(ValueError, match=r"the gate is torch\.bfloat16, the input torch\.float32"):
        ops.silu_gate(x, torch.randn(3, 8).bfloat16(), backend=backend)


# A run of every kernel in a process of its own, which prints a digest of all results and by how
# much the most memory ever used has grown.
PROGRAM = """
import hashlib, resource, sys
import torch
from jamba_lm.kernels import native_conv, native_scan

torch.manual_seed(0)
tokens, channels, states = (int(x) for x in sys.argv[1:4])
offsets = torch.tensor([0, tokens // 3, tokens])
u, dt = (torch.randn(tokens, channels, requires_grad=True) for _ in range(2))
B, C = (torch.randn(tokens, states, requires_grad=True) for _ in range(2))
A = (-torch.rand(channels, states)).requires_grad_()
weight = torch.randn(channels, 4, requires_grad=True)
bias, skip = (torch.randn(channels, requires_grad=True) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest = hashlib.sha256()
for path in sys.argv[4:]:
    x, window = native_conv.causal_conv(u, weight, bias, offsets, silu=True, path=path)
    y, state = native_scan.selective_scan(x, dt, bias, A, B, C, skip, offsets, path=path)
    leaves = [u, dt, B, C, A, weight, bias, skip]
    found = [x, window, y, state, *torch.autograd.grad(y.sum() + state.sum(), leaves)]
    for one in found:
        digest.update(one.detach().numpy().tobytes())
    del x, window, y, state, found
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(digest.hexdigest(), grown)
"""


def run_apart(sizes: tuple[int, int, int], paths: tuple[str, ...], **environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, sizes), *paths]
    done = subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_what_lay_in_memory_before_does_not_matter():
    # glibc fills every fresh block with the byte; outputs and working memory alike.
    sizes = (70, 37, 5)
    digests = {run_apart(sizes, PATHS, MALLOC_PERTURB_=byte)[0] for byte in ("0", "129")}
    assert len(digests) == 1


def test_nothing_of_the_size_of_tokens_times_channels_times_states_is_kept():
    tokens, channels, states = 4000, 512, 64
    grown = 1024 * int(run_apart((tokens, channels, states), PATHS[:1])[1])
    whole = 4 * tokens * channels * states
    # Checkpoints are a sixteenth; the rest are outputs, gradients and what torch keeps of them.
    allowed = whole / 16 + 12 * 4 * tokens * channels
    assert grown < allowed < whole / 3
