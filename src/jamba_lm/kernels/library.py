"""The shared library of CPU kernels: where it is, whether it fits, which instruction sets it has.

It knows no operation; the files named `native_*` call the functions it loads. Needs no torch, whose
import takes longer than everything else that a small model does in a short run.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jamba_lm.errors import BackendUnavailable

LIBRARY_PATH = Path(__file__).with_name("libjamba_kernels.so")

# JAMBA_ABI_VERSION of native/jamba_kernels.h: raised with every change of a struct or a function.
ABI_VERSION = 7

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
    _load_torch_threads()
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


def _load_torch_threads() -> None:
    """Load the OpenMP that came with torch, if one did, so that there is one pool of threads.

    Whoever comes first decides which copy of that name serves everybody, and torch is not always
    the first. It may also be the only copy on the machine.
    """
    torch = find_spec("torch")
    for folder in () if torch is None else torch.submodule_search_locations or ():
        copy = Path(folder) / "lib" / "libgomp.so.1"
        if copy.is_file():
            ctypes.CDLL(str(copy))


def loaded_library() -> Library:
    """Return the library.

    Raises:
        BackendUnavailable: it is missing or does not fit.
    """
    found = find_library()
    if isinstance(found, str):
        raise BackendUnavailable(f"backend 'native' cannot run: {found}")
    return found


def default_threads(library: Library) -> int:
    """Return how many threads to compute with when nobody says: as many as torch would take.

    As many as OpenMP does, which asks its own variables and which processors this process may use,
    but one for each core: two threads on one core wait for the same arithmetic.
    """
    try:
        most = int(library.handle.omp_get_max_threads())
    except AttributeError:
        # Built without OpenMP.
        return 1
    return max(1, min(most, _num_cores()))


def _num_cores() -> int:
    """Count the cores among the processors that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for processor in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            # A system that does not tell.
            cores.add(str(processor))
    return len(cores)
