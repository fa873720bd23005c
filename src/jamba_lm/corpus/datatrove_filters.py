"""The quality filters of Gopher, C4 and FineWeb, as datatrove has them, without its pipelines.

datatrove splits words with spaCy, which is slow and large, and sentences with a model that it
downloads; the splitter here is two patterns. `docs/data.md` says how often verdicts differ.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from jamba_lm.config_json import closest, shown
from jamba_lm.corpus.document import Drop
from jamba_lm.errors import BackendUnavailable, RecipeError

_CLASSES = {
    "gopher_repetition": "GopherRepetitionFilter",
    "gopher_quality": "GopherQualityFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}
# Ours to give: where dropped documents go, and what words are.
_OURS = ("self", "exclusion_writer", "language")
# What spaCy's English rules do to nearly all words: "don't" is two, "U.S." and "1,000.50" are one,
# a mark stands alone and "..." is one mark.
_WORD = re.compile(
    r"""
    (?:[A-Za-z]\.){2,}
    | (?:Mr|Mrs|Ms|Dr|St|Inc|Jr|Sr|Co|No|vs|etc|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec)\.
    | https?://\S+ | \w+@\S+
    | \d+(?:[.,:]\d+)+
    | \w+?(?=n['\u2019]t\b) | n['\u2019]t\b | ['\u2019](?:s|re|ve|ll|d|m)\b
    | \w+(?:[./]\w+)+ | \w+
    | ([^\w\s])\1*
    """,
    re.VERBOSE,
)
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'\u201d\u2019)]*(?=\s|$)|[.!?]+|\n|$)")


@cache
def _splitter() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Splitter(WordTokenizer):  # type: ignore[misc]
        """Words by one pattern, sentences by another."""

        def word_tokenize(self, text: str) -> list[str]:
            return [match[0] for match in _WORD.finditer(text)]

        def sent_tokenize(self, text: str) -> list[str]:
            return [one for one in map(str.strip, _SENTENCE.findall(text)) if one]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _SENTENCE.finditer(text) if match[0].strip()]

    return Splitter()


class DatatroveStage:
    """One of datatrove's filters.

    Attributes:
        counts: how many texts lost lines, which the C4 filter takes out.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        """Make the filter.

        Args:
            name: one of the stages of a recipe.
            options: under datatrove's names; its defaults are those of the papers.

        Raises:
            BackendUnavailable: datatrove is missing.
            RecipeError: the filter has no such option, or not of such a kind.
        """
        try:
            from datatrove import data
            from datatrove.pipeline import filters
        except ImportError as cause:
            raise BackendUnavailable(
                f"stage {name!r} needs datatrove: install it with `pip install 'jamba-lm[data]'`"
            ) from cause
        kind = getattr(filters, _CLASSES[name])
        parameters = inspect.signature(kind.__init__).parameters
        known = {key: one.default for key, one in parameters.items() if key not in _OURS}
        for key, value in options.items():
            if key not in known:
                hint = closest(key, known) or f"; known: {', '.join(known)}"
                raise RecipeError(f"unknown key in [{name}]: {shown(key)}{hint}")
            _check_kind(f"{name}.{key}", value, known[key])
        # Only the filters that split words can be told how.
        ours = {"language": _splitter()} if "language" in parameters else {}
        self.counts: Counter[str] = Counter()
        self._filter = kind(**options, **ours)
        self._document = data.Document

    def apply(self, text: str) -> str | Drop:
        """Return the text, less the lines that the filter takes out, or why it is dropped."""
        if not _WORD.search(text):
            # The filters divide by the number of words.
            return Drop("no words")
        document = self._document(text=text, id="")
        verdict = self._filter.filter(document)
        if isinstance(verdict, tuple):
            good, reason = verdict
        else:
            good, reason = verdict, ""
        if not good:
            return Drop(_reason(str(reason)))
        if document.text != text:
            self.counts["lines taken out"] += 1
            if not document.text.strip():
                return Drop("no lines left")
        return str(document.text)


def _reason(reason: str) -> str:
    # "enough stop words" is the name of the rule, not of what is wrong.
    plain = reason.removeprefix("gopher_").replace("enough_stop", "too_few_stop")
    return plain.replace("_", " ") or "dropped"


def _check_kind(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) or default is None:
        good = isinstance(value, bool) if default is not None else True
    elif isinstance(default, int | float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(default, tuple):
        good = isinstance(value, list) and all(
            isinstance(one, list) and len(one) == 2 for one in value
        )
    else:
        good = isinstance(value, type(default))
    if not good:
        raise RecipeError(
            f"{name} is {shown(value)}: expected something like its default, {shown(default)}"
        )
