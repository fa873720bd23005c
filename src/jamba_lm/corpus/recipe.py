"""How a corpus is prepared, as data: what a recipe file may say, and in which range.

Knows neither files of text nor how anything is carried out. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Stages that see one document at a time, by the names that a source's `stages` lists.
STAGES = (
    "fix_text",
    "language",
    "gopher_repetition",
    "gopher_quality",
    "c4",
    "fineweb",
    "code",
    "pii",
    "decontaminate",
)
FORMATS = ("auto", "text", "jsonl", "parquet", "datatrove")
ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252")
EXECUTORS = ("local", "datatrove-local", "slurm", "ray")
DEMO_TOKENIZER = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents of one kind, and what becomes of them.

    Attributes:
        name: stands in the report, in the names of shards and for the loader.
        files: patterns, relative to the recipe; `**` goes into folders.
        format: "auto" goes by a file's name; "datatrove" has `reader` and no files.
        field: key or column of the text, in files that have any.
        encoding: of plain text files.
        separator: a line that stands between the documents of a plain text file; a file is one
            document when it is empty.
        reader: class in `datatrove.pipeline.readers`.
        reader_options: what that class is made with.
        stages: names of the stages that a document passes, in this order.
        weight: share of the training tokens, before all weights are brought to sum to one.
    """

    name: str
    files: tuple[str, ...] = ()
    format: str = "auto"
    field: str = "text"
    encoding: str = "utf-8"
    separator: str = ""
    reader: str = ""
    reader_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsSection:
    """What a document may be.

    Attributes:
        maximum_bytes: a longer one is dropped unread.
        minimum_characters: a shorter one is dropped.
        unusable: "drop" counts a broken document and goes on, "stop" ends with an error.
    """

    maximum_bytes: int = 64 * 2**20
    minimum_characters: int = 1
    unusable: str = "drop"


@dataclass(frozen=True, kw_only=True, slots=True)
class FixTextSection:
    """Mend broken encodings with ftfy, and bring line ends and Unicode to one form.

    Attributes:
        normalization: Unicode normal form; "none" leaves characters as they are.
        uncurl_quotes: make typographic quotes plain.
    """

    normalization: str = "NFC"
    uncurl_quotes: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageSection:
    """Keep documents of some languages; the model is a fastText file that the user brings."""

    model: str
    keep: tuple[str, ...]
    minimum_score: float = 0.65


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterOptions:
    """Options of one of datatrove's filters, under datatrove's own names."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSection:
    """What source code must look like; see `code_filter.py`."""

    maximum_line_characters: int = 1000
    maximum_mean_line_characters: int = 100
    minimum_alphanumeric: float = 0.25
    maximum_encoded: float = 0.5
    drop_generated: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PiiSection:
    """What is masked."""

    kinds: tuple[str, ...] = ("email", "ip")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateSection:
    """Texts that must not be trained on, and how much of one makes a document a copy.

    Attributes:
        files: evaluation files, .jsonl or plain text, patterns as in a source.
        fields: keys whose texts are protected, in .jsonl files.
        ngram: words of a sequence that is looked for.
        minimum_words: a protected text with fewer words than this is not looked for; one between
            this and `ngram` is looked for whole.
        allowed_matches: a document with more sequences than this in common is dropped.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)
    ngram: int = 13
    minimum_words: int = 8
    allowed_matches: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicatesSection:
    """Which documents count as one. The first in the order of the recipe's sources is kept.

    Attributes:
        exact: drop documents of the same text.
        near: drop documents that share most of their word sequences.
        ngram: words of a sequence.
        bands: groups of hashes; documents that agree in one of them are compared.
        rows: hashes of a band.
        threshold: estimated Jaccard similarity from which on two documents are one.
    """

    exact: bool = True
    near: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSection:
    """Share of the documents that is held out, chosen by a hash of their own text."""

    validation: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensSection:
    """What the tokens are, and how they lie.

    Attributes:
        tokenizer: folder with tokenizer.json, or "demo" for the one in the package.
        shard_tokens: tokens of a file, about.
    """

    tokenizer: str = DEMO_TOKENIZER
    shard_tokens: int = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSection:
    """How many documents of each kind the report shows, and how much of each."""

    samples: int = 3
    sample_characters: int = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionSection:
    """Who does the work. Nothing of this changes a byte of the result.

    Attributes:
        executor: "local" is this machine and needs no package; the others are datatrove's.
        workers: processes at the same time.
        tasks: pieces that reading and tokenizing are cut into, each redone whole after a kill;
            0 makes one of every 64 MiB of input.
        options: more arguments for datatrove's executor, such as `partition` and `time`.
    """

    executor: str = "local"
    workers: int = 1
    tasks: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusRecipe:
    """Everything that a preparation needs to know. Paths are absolute."""

    source: tuple[Source, ...]
    documents: DocumentsSection = dataclasses.field(default_factory=DocumentsSection)
    fix_text: FixTextSection = dataclasses.field(default_factory=FixTextSection)
    language: LanguageSection | None = None
    gopher_repetition: FilterOptions = dataclasses.field(default_factory=FilterOptions)
    gopher_quality: FilterOptions = dataclasses.field(default_factory=FilterOptions)
    c4: FilterOptions = dataclasses.field(default_factory=FilterOptions)
    fineweb: FilterOptions = dataclasses.field(default_factory=FilterOptions)
    code: CodeSection = dataclasses.field(default_factory=CodeSection)
    pii: PiiSection = dataclasses.field(default_factory=PiiSection)
    decontaminate: DecontaminateSection | None = None
    duplicates: DuplicatesSection = dataclasses.field(default_factory=DuplicatesSection)
    split: SplitSection = dataclasses.field(default_factory=SplitSection)
    tokens: TokensSection = dataclasses.field(default_factory=TokensSection)
    report: ReportSection = dataclasses.field(default_factory=ReportSection)
    execution: ExecutionSection = dataclasses.field(default_factory=ExecutionSection)

    def to_dict(self) -> dict[str, Any]:
        """Return plain sections, as JSON keeps them, with nothing left to a default."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def used_stages(self) -> set[str]:
        """Return the stages that some source passes."""
        return {stage for source in self.source for stage in source.stages}


def result_digest(sections: Mapping[str, Any]) -> str:
    """Name what a recipe makes: everything but who does the work."""
    kept = {name: value for name, value in sections.items() if name != "execution"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
