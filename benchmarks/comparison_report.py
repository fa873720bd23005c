"""The record of `cpu_inference` as tables and as a picture. Measures nothing.

A number that is not known to within a tenth is in brackets: it may be looked at and not quoted.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GIB = 1024**3
# The limit that the machine sets, measured like an engine.
MACHINE = "roofline"
START, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def markdown(result: Mapping[str, Any]) -> str:
    """Return everything as Markdown, one table for each shape."""
    peaks, after, hardware = result["peaks"], result["peaks_after"], result["hardware"]
    products = ", ".join(
        f"{name} {span(1e-9 * flops, 1e-9 * after['product_flops'][name])}"
        for name, flops in peaks["product_flops"].items()
    )
    lines = [
        f"{hardware['processor']}, {peaks['threads']} threads, torch {hardware['torch']}, commit "
        f"{hardware['commit']}. Before and after the run memory is read at "
        f"{span(1e-9 * peaks['read_bytes'], 1e-9 * after['read_bytes'])} GB/s; matrix products "
        f"reach {products} G operations/s, multiply-adds in registers "
        f"{span(1e-9 * peaks['fma_flops'], 1e-9 * after['fma_flops'])}.",
        "",
        "```sh",
        result["command"],
        "```",
    ]
    for shape in dict.fromkeys(block["shape"] for block in result["blocks"]):
        blocks = [block for block in result["blocks"] if block["shape"] == shape]
        lines += ["", f"### {shape}", "", *speed_table(blocks)]
        if any("cold" in block for block in blocks):
            lines += ["", *cold_table(blocks)]
        lines += ["", *parity_lines(blocks)]
    return "\n".join(lines)


def span(one: float, other: float) -> str:
    """Write two measurements of the same thing, the lower one first."""
    low, high = (
        f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in sorted((one, other))
    )
    return low if low == high else f"{low} to {high}"


def speed_table(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of tokens a second with the ratios to the peers and to the roofline."""
    lines = [
        "| tokens/s | ours | share of the roofline | peers, and ours over theirs |",
        "| --- | ---: | ---: | --- |",
    ]
    for block in blocks:
        for what, speed in block["speed"].items():
            engines, ratios = speed["engines"], speed["ratios"]
            ours = engines.get("jamba")
            peers = [
                f"{name} {rate(one)} ({times(ratios.get(name))})"
                for name, one in engines.items()
                if name not in ("jamba", MACHINE)
            ]
            peers += [f"{name} failed" for name in speed["failed"] if name != "jamba"]
            # The roofline's time over ours: the share of it that is reached.
            share = percent(ratios[MACHINE]) if MACHINE in ratios else ""
            lines.append(
                f"| {block['type']}, {what} | {'not run' if ours is None else rate(ours)} "
                f"| {share} | {', '.join(peers)} |"
            )
    return lines


def rate(one: Mapping[str, Any]) -> str:
    """Write tokens a second with three figures; in brackets when they may not be quoted."""
    number = one["tokens_per_second"]
    text = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return text if one["problem"] is None else f"[{text}]"


def times(ratio: Mapping[str, Any] | None) -> str:
    """Write ours over theirs and how well it is known; in brackets when it may not be quoted."""
    if ratio is None:
        return "ours not run"
    low, high = ratio["interval"]
    text = f"**{ratio['median']:.2f}x**, {low:.2f} to {high:.2f}"
    return text if ratio["problem"] is None else f"[{text}]"


def percent(ratio: Mapping[str, Any]) -> str:
    """Write a share of the roofline; in brackets when it may not be quoted."""
    text = f"{100 * ratio['median']:.0f} %"
    return text if ratio["problem"] is None else f"[{text}]"


def cold_table(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the time to the first token and of the most memory."""
    lines = [
        "| engine | first token from the start of the process | peak memory | weights |",
        "| --- | ---: | ---: | ---: |",
    ]
    for block in blocks:
        for name, one in block.get("cold", {}).items():
            label = f"{name} {block['type']}" if name == "jamba" else name
            if "failed" in one:
                lines.append(f"| {label} | failed | | |")
                continue
            seconds = f"{one['seconds']:.2f} s"
            shown = seconds if one["first_token"]["disturbed"] is None else f"[{seconds}]"
            weights = f"{block['weight_bytes'] / GIB:.2f} GiB" if name == "jamba" else ""
            lines.append(f"| {label} | {shown} | {one['peak_bytes'] / GIB:.2f} GiB | {weights} |")
    return lines


def parity_lines(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the engines were found to compute."""
    lines = [
        "| engine | error of the logits | KL, nats | top-1 | greedy tokens the same |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for block in blocks:
        for name, one in block["parity"]["engines"].items():
            label = f"{name} {block['type']}" if name == "jamba" else name
            note = "" if one["problem"] is None else f"; not measured: {one['problem']}"
            if "error_with_same_weights" in one:
                held = [f"{one['error_with_same_weights']:.1e} with the same rounded weights"]
                if "error_with_rows_kept" in one:  # not in records of before
                    held.append(f"{one['error_with_rows_kept']:.1e} with rows kept")
                note = f" ({', '.join(held)}){note}"
            lines.append(
                f"| {label} | {one['error']:.1e}{note} | {one['divergence']:.1e} "
                f"| {one['top1']:.3f} | {one['same_greedy']} of {one['greedy']} |"
            )
        for name, why in block["parity"]["failed"].items():
            lines.append(f"| {name} | failed: {why} | | | |")
    return lines


def replace_tables(document: Path, tables: str) -> None:
    """Put the tables between their marks in a document."""
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    document.write_text(f"{before}{START}\n{tables}\n{END}{after}", encoding="utf-8", newline="\n")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw tokens a second of every engine beside the roofline, one panel for each shape.

    Needs matplotlib; without it a line says that there is no picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no picture: matplotlib is not installed; pip install 'jamba-lm[plot]'", file=sys.stderr
        )
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(block["shape"] for block in result["blocks"]))
    figure, panels = pyplot.subplots(
        len(shapes), 1, figsize=(9, 3.2 * len(shapes)), squeeze=False, layout="constrained"
    )
    for panel, shape in zip(panels[:, 0], shapes, strict=True):
        bars = bars_of([block for block in result["blocks"] if block["shape"] == shape])
        for engine in dict.fromkeys(bar[1] for bar in bars):
            places = [(at, value) for at, name, value in bars if name == engine]
            panel.bar(
                [at for at, _ in places],
                [value for _, value in places],
                width=1.0,
                label=engine,
                color="lightgrey" if engine == MACHINE else None,
            )
        panel.set_xticks(
            [at for at, name, _ in bars if name.startswith("jamba")],
            labels_of([block for block in result["blocks"] if block["shape"] == shape]),
            rotation=20,
            ha="right",
            fontsize=7,
        )
        panel.set_yscale("log")
        panel.set_ylabel("tokens/s")
        panel.set_title(shape, fontsize=9)
        panel.legend(fontsize=7, ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars_of(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[float, str, float]]:
    """List the place, the engine (or the roofline) and tokens a second of each bar."""
    bars: list[tuple[float, str, float]] = []
    at = 0.0
    for block in blocks:
        for speed in block["speed"].values():
            for name, one in speed["engines"].items():
                bars.append((at, name, one["tokens_per_second"]))
                at += 1
            at += 1
    return bars


def labels_of(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """List what each group of bars with one of ours is."""
    return [
        f"{block['type']}, {what}"
        for block in blocks
        for what, speed in block["speed"].items()
        if "jamba" in speed["engines"]
    ]
