"""Documents that hold text of an evaluation, found by the word sequences they share with it.

Sequences of 13 words, as in GPT-3 (arXiv 2005.14165, appendix C). Knows nothing of training.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jamba_lm.corpus.compressed import BrokenFile, lines, open_plain, plain_name
from jamba_lm.corpus.document import Drop
from jamba_lm.corpus.patterns import matching_files
from jamba_lm.corpus.recipe import DecontaminateSection
from jamba_lm.corpus.shingles import shingles, word_numbers
from jamba_lm.errors import DataError
from jamba_lm.files import parse_json

Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)
MAXIMUM_EVALUATION_BYTES = 2**30
MAXIMUM_LINE_BYTES = 2**26


def evaluation_files(options: DecontaminateSection) -> list[Path]:
    """List the files that are protected.

    Raises:
        DataError: a pattern finds nothing.
    """
    found: list[Path] = []
    for pattern in options.files:
        files = matching_files(pattern)
        if not files:
            raise DataError(
                f"decontaminate.files: nothing at {pattern!r}; an evaluation that is not there "
                "would not be protected"
            )
        found += files
    return found


def _protected_texts(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    try:
        with open_plain(path) as file:
            if not plain_name(path).endswith((".jsonl", ".ndjson")):
                data = file.read(MAXIMUM_EVALUATION_BYTES + 1)
                if len(data) > MAXIMUM_EVALUATION_BYTES:
                    raise DataError(f"{str(path)!r} is too long for an evaluation file")
                yield data.decode("utf-8")
                return
            for number, (line, _) in enumerate(lines(file, MAXIMUM_LINE_BYTES), 1):
                if not line.strip():
                    continue
                row = parse_json(line, f"line {number} of {str(path)!r}", DataError)
                texts = [row[field] for field in fields if isinstance(row.get(field), str)]
                if not texts:
                    raise DataError(
                        f"line {number} of {str(path)!r} has no text under "
                        f"{' or '.join(map(repr, fields))}: set decontaminate.fields"
                    )
                yield from texts
    except UnicodeDecodeError as cause:
        raise DataError(f"{str(path)!r} is not UTF-8 at byte {cause.start}") from cause
    except BrokenFile as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause}") from cause
    except OSError as cause:
        raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause


class DecontaminationStage:
    """Drops documents that hold protected text.

    Attributes:
        counts: how many protected texts were too short to be looked for.
    """

    def __init__(self, options: DecontaminateSection) -> None:
        """Read the evaluation files.

        Raises:
            DataError: a file is missing, unreadable or holds no text.
        """
        self.counts: Counter[str] = Counter()
        self._allowed = options.allowed_matches
        self._names: list[str] = []
        # By the number of words of a sequence: the sequences, sorted, and the file of each.
        pieces: dict[int, list[tuple[Array, int]]] = {}
        short = 0
        for path in evaluation_files(options):
            self._names.append(path.name)
            for text in _protected_texts(path, options.fields):
                words = word_numbers(text)
                if len(words) < options.minimum_words:
                    short += 1
                    continue
                length = min(len(words), options.ngram)
                pieces.setdefault(length, []).append(
                    (shingles(words, length), len(self._names) - 1)
                )
        if short:
            logger.warning(
                "%d evaluation texts have fewer than %d words and are not looked for",
                short,
                options.minimum_words,
            )
        self._known: dict[int, tuple[Array, Array]] = {}
        for length, found in sorted(pieces.items()):
            numbers = np.concatenate([numbers for numbers, _ in found])
            files = np.concatenate([np.full(len(n), file, np.int32) for n, file in found])
            unique, first = np.unique(numbers, return_index=True)
            self._known[length] = unique, files[first]
        self.not_looked_for = short

    def apply(self, text: str) -> str | Drop:
        """Return `text` as it is, or of which evaluation it holds a part."""
        words = word_numbers(text)
        matches: Counter[str] = Counter()
        for length, (known, files) in self._known.items():
            numbers = np.unique(shingles(words, length))
            if not len(numbers):
                continue
            places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
            for place in places[known[places] == numbers].tolist():
                matches[self._names[files[place]]] += 1
        if matches.total() > self._allowed:
            # By count and then by name: the verdict must not hang on the order of a dict.
            name = min(matches, key=lambda one: (-matches[one], one))
            return Drop(f"holds text of {name}")
        return text
