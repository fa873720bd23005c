"""Who serves each operation on this machine, how, and why not the others: what `doctor` tells."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_lm.errors import BackendUnavailable
from jamba_lm.kernels import ops, reference
from jamba_lm.kernels.choice import requested_backend
from jamba_lm.kernels.library import LIBRARY_PATH, Library, find_library


@dataclass(frozen=True, slots=True)
class Serving:
    """Who runs one operation, on float32 or bfloat16 tensors in the memory of the CPU.

    Attributes:
        operation: its name in `ops`.
        backend: who runs it; None when the back-end that JAMBA_BACKEND names cannot.
        method: how that back-end does it.
        refusals: for each other back-end, or for the one that was named, why it does not.
    """

    operation: str
    backend: str | None
    method: str
    refusals: dict[str, str]


@dataclass(frozen=True, slots=True)
class LibraryReport:
    """The state of the shared library of kernels.

    Attributes:
        path: where it is looked for.
        problem: why it cannot be used; None when it can.
        instruction_sets: those it was built for, best first, and whether each runs here.
    """

    path: str
    problem: str | None
    instruction_sets: dict[str, bool]


def library_report() -> LibraryReport:
    """Describe the shared library."""
    library = find_library()
    if isinstance(library, Library):
        sets = {name: name in library.paths_here for name in library.paths}
        return LibraryReport(str(LIBRARY_PATH), None, sets)
    return LibraryReport(str(LIBRARY_PATH), library, {})


def servings() -> list[Serving]:
    """List every operation with the back-end that serves it."""
    return [_serving(operation) for operation in sorted(reference.OPERATIONS)]


def _serving(operation: str) -> Serving:
    named = requested_backend()
    try:
        chosen = ops.choose(operation)
    except BackendUnavailable as error:
        return Serving(operation, None, "", {str(named): str(error)})
    refusals = {}
    for name, module in ops.BACKENDS.items():
        if module is chosen:
            backend = name
        elif named is not None:
            refusals[name] = f"JAMBA_BACKEND names {named}"
        else:
            refusals[name] = module.why_not(operation) or "it is slower"
    return Serving(operation, backend, chosen.method(operation), refusals)
