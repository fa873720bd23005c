"""`jamba doctor`: which kernels serve each operation on this machine, and how fast it is.

Measuring is asked for: it takes seconds, and means nothing while other work keeps the machine busy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm import __version__
from jamba_lm.analysis.machine import usable_memory
from jamba_lm.analysis.processor import Processor, this_processor
from jamba_lm.cli.options import JsonOption, named_path
from jamba_lm.cli.output import Output
from jamba_lm.cli.quantities import show_bytes
from jamba_lm.cli.shapes import open_shape
from jamba_lm.cli.speed import (
    describe_prediction,
    describe_speeds,
    predict_speed,
    prediction_values,
    speeds_values,
)

if TYPE_CHECKING:
    from jamba_lm.kernels.report import LibraryReport, Serving

# What the package needs or can use; an absent one is told as such.
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the doctor found.

    Attributes:
        versions: of Python and of packages; None where one is absent.
        memory: bytes a process here can hope for.
        threads: with which torch, and so every kernel, computes.
        named: what JAMBA_BACKEND says.
    """

    versions: dict[str, str | None]
    processor: Processor
    memory: int
    threads: int
    named: str | None
    library: LibraryReport
    servings: list[Serving]


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_OR_PRESET]",
            help="Predict how fast this model is here: a checkpoint folder, a config.json or the "
            "name of a preset. Measures.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure what memory and processor can do: a few seconds."),
    ] = False,
    weights: Annotated[
        str, typer.Option(help="How the weights of MODEL_OR_PRESET are kept, as in `jamba plan`.")
    ] = "bf16",
    json: JsonOption = False,
) -> None:
    """Say which back-end serves each operation here, how, and why not the others."""
    config = None if model is None else open_shape(model, None)[0]
    findings = examine()
    output = Output(json)
    for line in describe(findings):
        output.line(line)
    values = as_values(findings)
    if model is not None and named_path(model).is_dir():
        reason = why_torch(named_path(model))
        output.line()
        output.line(
            f"{model} generates without importing torch"
            if reason is None
            else f"{model} generates with torch, whose import takes seconds: {reason}"
        )
        values["start"] = {"model": model, "torch": reason is not None, "reason": reason}
    if config is not None:
        output.line()
        output.line(f"{model}, {weights}: what `jamba bench` will measure, from a few layers")
        prediction = predict_speed(config, weights, batch=1)
        for line in (*describe_speeds(prediction.speeds), *describe_prediction(prediction)):
            output.line(line)
        values["prediction"] = {"model": model, "format": weights, **prediction_values(prediction)}
    elif measure:
        from jamba_lm.analysis.machine_speed import measure_speeds

        speeds = measure_speeds()
        output.line()
        for line in describe_speeds(speeds):
            output.line(line)
        values["measured"] = speeds_values(speeds)
    output.result(values)


def why_torch(folder: Path) -> str | None:
    """Say why generating from a checkpoint imports torch, or None when it does not."""
    from jamba_lm.native_model import open_native

    found = open_native(folder)
    return found if isinstance(found, str) else None


def examine() -> Findings:
    """Look at the machine, the installed packages and the kernels."""
    import torch

    from jamba_lm.kernels.choice import requested_backend
    from jamba_lm.kernels.report import library_report, servings

    return Findings(
        versions={
            "jamba-lm": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        processor=this_processor(),
        memory=usable_memory(),
        threads=torch.get_num_threads(),
        named=requested_backend(),
        library=library_report(),
        servings=servings(),
    )


def _version(package: str) -> str | None:
    # A tenth of the time that `jamba plan` may take, and no other command needs it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(findings: Findings) -> Iterator[str]:
    """Yield the lines that answer a person."""
    versions = (f"{name} {found or 'absent'}" for name, found in findings.versions.items())
    yield f"versions    {', '.join(versions)}"
    processor = findings.processor
    yield (
        f"processor   {processor.name}, {processor.cores} cores, {show_bytes(findings.memory)}, "
        f"computing with {findings.threads} threads"
    )
    yield f"            {' '.join(processor.features) or 'no features known'}"
    library = findings.library
    if library.problem is None:
        sets = ", ".join(
            name if runs else f"{name} (not on this processor)"
            for name, runs in library.instruction_sets.items()
        )
        yield f"kernels     {sets}, in {library.path}"
    else:
        yield f"kernels     none: {library.problem}"
    if findings.named is not None:
        yield f"JAMBA_BACKEND is {findings.named}"
    yield ""
    yield f"{'operation':16}{'served by':12}{'how':36}why not the others"
    for serving in findings.servings:
        refusals = "; ".join(f"{name}: {why}" for name, why in serving.refusals.items())
        yield (
            f"{serving.operation:16}{serving.backend or 'nobody':12}{serving.method:36}{refusals}"
        )
    yield ""
    yield "float16 tensors, and those on other devices, go to the reference (attention excepted)."


def as_values(findings: Findings) -> dict[str, Any]:
    """Return what `--json` prints; memory is in bytes."""
    return {
        "versions": findings.versions,
        "processor": asdict(findings.processor),
        "memory": findings.memory,
        "threads": findings.threads,
        "jamba_backend": findings.named,
        "library": asdict(findings.library),
        "operations": {
            serving.operation: {
                "backend": serving.backend,
                "method": serving.method,
                "refusals": serving.refusals,
            }
            for serving in findings.servings
        },
    }
