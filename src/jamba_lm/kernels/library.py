"""The shared library of CPU kernels: where it is, whether it fits, which instruction sets it has.

It knows no operation; the files named `native_*` call the functions it loads.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.errors import BackendUnavailable

LIBRARY_PATH = Path(__file__).with_name("libjamba_kernels.so")

# JAMBA_ABI_VERSION of native/jamba_kernels.h: raised with every change of a struct or a function.
ABI_VERSION = 5

_FUNCTIONS = (
    "jamba_selective_scan",
    "jamba_selective_scan_backward",
    "jamba_causal_conv",
    "jamba_causal_conv_backward",
    "jamba_norm",
    "jamba_norm_backward",
    "jamba_gate",
    "jamba_gate_backward",
    "jamba_softmax_sums",
    "jamba_softmax_slopes",
    "jamba_product",
    "jamba_unpack",
    "jamba_step",
    "jamba_prefill",
)

# What the functions return, other than 0: the JAMBA_* statuses of native/jamba_kernels.h.
_FAILURES = {
    1: "this processor lacks the instruction set asked for",
    2: "offsets must rise strictly from 0 to the number of rows",
    3: "a size is out of range (the convolution takes 1 to 8 taps)",
    4: "no memory for the working buffers",
}


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library."""

    handle: ctypes.CDLL
    paths: tuple[str, ...]
    paths_here: tuple[str, ...]

    def call(self, function: str, arguments: bytes | ctypes.c_char_p) -> None:
        """Call `function` with its packed struct, or with where that lies.

        Raises:
            BackendUnavailable: the library refused; it has written nothing.
        """
        status = getattr(self.handle, function)(arguments)
        if status != 0:
            raise BackendUnavailable(f"{function}: {_FAILURES[status]}")

    def path_code(self, path: str | None) -> int:
        """Return the number by which a call asks for instruction set `path`; 0 is the best one.

        Raises:
            BackendUnavailable: the library has no such path, or the processor cannot run it.
        """
        if path is None:
            return 0
        if path not in self.paths_here:
            raise BackendUnavailable(
                f"instruction set {path!r} does not run here; choose one of "
                f"{', '.join(self.paths_here)}"
            )
        return 1 + self.paths.index(path)


@functools.cache
def find_library(path: Path = LIBRARY_PATH) -> Library | str:
    """Load the library, once; a string says why it cannot be used."""
    if not path.is_file():
        return (
            f"{path.name} was not built (in a checkout run `make native`; otherwise install again "
            "where there is a C++ compiler)"
        )
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); build it again on this machine"
    version = handle.jamba_abi_version()
    if version != ABI_VERSION:
        return (
            f"{path.name} has interface version {version}, this package needs {ABI_VERSION}; "
            "build it again"
        )
    for function in _FUNCTIONS:
        getattr(handle, function).argtypes = [ctypes.c_char_p]
    handle.jamba_path_name.argtypes = [ctypes.c_int64]
    handle.jamba_path_name.restype = ctypes.c_char_p
    handle.jamba_path_runs_here.argtypes = [ctypes.c_int64]
    handle.jamba_vector_function.argtypes = [ctypes.c_int64] * 5
    paths: list[str] = []
    while (name := handle.jamba_path_name(len(paths))) is not None:
        paths.append(name.decode())
    here = tuple(name for i, name in enumerate(paths) if handle.jamba_path_runs_here(i))
    return Library(handle=handle, paths=tuple(paths), paths_here=here)


def loaded_library() -> Library:
    """Return the library.

    Raises:
        BackendUnavailable: it is missing or does not fit.
    """
    found = find_library()
    if isinstance(found, str):
        raise BackendUnavailable(f"backend 'native' cannot run: {found}")
    return found


def address(x: Tensor | None) -> int:
    """Return where the values of `x` begin, 0 for None: a null pointer in C."""
    return 0 if x is None else x.data_ptr()


def with_unit_columns(x: Tensor) -> Tensor:
    """Return `x`, copied only when neighbours of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gradient_is_needed(*tensors: Tensor | None) -> bool:
    """Say whether autograd will ask for the gradient of any of `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# JAMBA_EXP2 .. JAMBA_SIGMOID of native/jamba_kernels.h.
_VECTOR_FUNCTIONS = ("exp2", "exp", "softplus", "sigmoid")


def evaluate(path: str, function: str, x: Tensor) -> Tensor:
    """Apply a vector function of the kernels to contiguous float32 `x`, for tests of its error."""
    library = loaded_library()
    y = torch.empty_like(x)
    library.handle.jamba_vector_function(
        library.path_code(path),
        _VECTOR_FUNCTIONS.index(function),
        x.data_ptr(),
        y.data_ptr(),
        x.numel(),
    )
    return y
