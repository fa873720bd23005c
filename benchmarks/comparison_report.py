"""The record of `cpu_inference` as tables and as a picture. Measures nothing.

A number that was not taken on a quiet machine is in brackets: it may be looked at and not quoted.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GIB = 1024**3
START, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def markdown(result: Mapping[str, Any]) -> str:
    """Return everything as Markdown, one table for each shape."""
    peaks, hardware = result["peaks"], result["hardware"]
    products = ", ".join(
        f"{name} {1e-9 * flops:,.0f}" for name, flops in peaks["product_flops"].items()
    )
    lines = [
        f"{hardware['processor']}, {peaks['threads']} threads, torch {hardware['torch']}, commit "
        f"{hardware['commit']}. Memory is read at {1e-9 * peaks['read_bytes']:.1f} GB/s; matrix "
        f"products reach {products} G operations/s, multiply-adds in registers "
        f"{1e-9 * peaks['fma_flops']:,.0f}.",
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


def speed_table(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of tokens a second with the ratios to the peers and to the roofline."""
    lines = [
        "| tokens/s | ours | roofline | share of it | peers, and ours over theirs |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for block in blocks:
        for what, speed in block["speed"].items():
            engines = speed["engines"]
            roofline = speed["roofline_tokens_per_second"]
            ours = engines.get("jamba")
            peers = [
                f"{name} {rate(one)} ({ratio(ours, one)})"
                for name, one in engines.items()
                if name != "jamba"
            ]
            share = "" if ours is None else f"{100 * ours['tokens_per_second'] / roofline:.0f} %"
            lines.append(
                f"| {block['type']}, {what} | {'not run' if ours is None else rate(ours)} "
                f"| {roofline:,.0f} | {share} | {', '.join(peers)} |"
            )
    return lines


def rate(one: Mapping[str, Any]) -> str:
    """Write tokens a second with three figures; in brackets when the block was contaminated."""
    number = one["tokens_per_second"]
    text = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return text if one["problem"] is None else f"[{text}]"


def ratio(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any]) -> str:
    """Write ours over theirs; in brackets when either block was contaminated."""
    if ours is None:
        return "ours not run"
    text = f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x"
    return text if ours["problem"] is None and theirs["problem"] is None else f"[{text}]"


def cold_table(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the time to the first token and of the most memory."""
    lines = [
        "| engine | first token from the start of the process | peak memory | weights |",
        "| --- | ---: | ---: | ---: |",
    ]
    for block in blocks:
        for name, one in block.get("cold", {}).items():
            label = f"{name} {block['type']}" if name == "jamba" else name
            seconds = f"{one['seconds']:.2f} s"
            shown = seconds if one["first_token"]["problem"] is None else f"[{seconds}]"
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
            lines.append(
                f"| {label} | {one['error']:.1e}{note} | {one['divergence']:.1e} "
                f"| {one['top1']:.3f} | {one['same_greedy']} of {one['greedy']} |"
            )
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
            places = [(at, value) for at, name, value, _ in bars if name == engine]
            panel.bar(
                [at for at, _ in places], [value for _, value in places], width=1.0, label=engine
            )
        for at, _, _, roofline in bars:
            panel.plot([at - 0.5, at + 0.5], [roofline, roofline], color="black", linewidth=1)
        panel.set_xticks(
            [at for at, name, _, _ in bars if name.startswith("jamba")],
            labels_of([block for block in result["blocks"] if block["shape"] == shape]),
            rotation=20,
            ha="right",
            fontsize=7,
        )
        panel.set_yscale("log")
        panel.set_ylabel("tokens/s")
        panel.set_title(f"{shape} (the line is the roofline of ours)", fontsize=9)
        panel.legend(fontsize=7, ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars_of(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[float, str, float, float]]:
    """List the place, the engine, tokens a second and the roofline of each bar."""
    bars: list[tuple[float, str, float, float]] = []
    at = 0.0
    for block in blocks:
        for speed in block["speed"].values():
            for name, one in speed["engines"].items():
                roofline = speed["roofline_tokens_per_second"]
                bars.append((at, name, one["tokens_per_second"], roofline))
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
