"""The report of a preparation as one page of HTML that needs nothing beside it.

Everything that comes from a document is escaped. Knows the report's form and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #d5dae0; padding: 0.3rem 0.6rem; text-align: left;
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: 0.6rem;
      border-radius: 4px; font-size: 13px; }
summary { cursor: pointer; }
figcaption { color: #57606a; font-size: 14px; }
figure { margin: 0.6rem 0; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } pre { background: #161b22; }
  th, td { border-color: #30363d; } figcaption { color: #9198a1; }
}
"""


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [
        "<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Corpus report</title>\n<style>{_STYLE}</style>",
        "<h1>Corpus report</h1>",
        _result(report),
        *(_source(source) for source in report["sources"]),
        _seconds(report["cpu_seconds"]),
        "</html>\n",
    ]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    def row(cells: list[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=number' if place >= numbers_from else ''}>{cell}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table>\n{row(head, 'th')}\n{body}\n</table>"


def _result(report: Mapping[str, Any]) -> str:
    weights = sum(source["weight"] for source in report["sources"])
    rows = [
        [
            escape(source["name"]),
            f"{100 * source['weight'] / weights:.1f} %",
            *(
                f"{source['result'][side][key]:,}"
                for side in ("train", "validation")
                for key in ("documents", "tokens")
            ),
        ]
        for source in report["sources"]
    ]
    total = report["total"]
    rows.append(
        [
            "<b>all</b>",
            "",
            *(
                f"<b>{total[side][key]:,}</b>"
                for side in ("train", "validation")
                for key in ("documents", "tokens")
            ),
        ]
    )
    head = ["source", "weight", "training documents", "tokens", "held-out documents", "tokens"]
    return f"<h2>What there is</h2>\n{_table(head, rows)}"


def _source(source: Mapping[str, Any]) -> str:
    rows = []
    for stage in source["stages"][:-1]:
        lost = stage["documents_in"] - stage["documents_out"]
        share = f"{100 * lost / stage['documents_in']:.1f} %" if stage["documents_in"] else ""
        reasons = ", ".join(
            f"{escape(reason)} {count:,}"
            for reason, count in sorted(stage["dropped"].items(), key=lambda one: (-one[1], one[0]))
        )
        notes = ", ".join(f"{escape(key)} {count:,}" for key, count in stage["counts"].items())
        rows.append(
            [
                escape(stage["stage"]),
                "; ".join(text for text in (reasons, f"<i>{notes}</i>" if notes else "") if text),
                f"{stage['documents_in']:,}",
                f"{lost:,}",
                share,
                f"{stage['bytes_out']:,}",
            ]
        )
    head = ["stage", "dropped because", "documents", "dropped", "", "bytes left"]
    samples = "\n".join(_samples(stage) for stage in source["stages"])
    return f"<h2>{escape(source['name'])}</h2>\n{_table(head, rows, 2)}\n{samples}"


def _samples(stage: Mapping[str, Any]) -> str:
    parts = []
    for reason, samples in stage["samples"].items():
        figures = "\n".join(_sample(sample) for sample in samples)
        name = f"{stage['stage']}: {reason}" if reason != stage["stage"] else reason
        parts.append(f"<details><summary>{escape(name)}</summary>\n{figures}\n</details>")
    return "\n".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    figure = _figure(sample["place"], sample["text"])
    if "kept" in sample:
        kept = sample["kept"]
        figure += _figure(f"kept instead: {kept['place']}", kept["text"])
    return figure


def _figure(caption: str, text: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption><pre>{escape(text)}</pre></figure>"


def _seconds(seconds: Mapping[str, float]) -> str:
    rows = [[escape(name), f"{spent:,.2f}"] for name, spent in seconds.items()]
    return f"<h2>Processor time</h2>\n{_table(['', 'seconds'], rows)}"
