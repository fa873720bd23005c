"""Source code worth reading: not generated, not minified, not data in the shape of code.

The limits on lines and letters are those of The Stack (arXiv 2211.15533, section 3) and StarCoder
(arXiv 2305.06161, section 3); the words of generators are ours. Knows no files.
"""

from __future__ import annotations

import re
from collections import Counter

from jamba_lm.corpus.document import Drop
from jamba_lm.corpus.recipe import CodeSection

# What generators write at the top of a file; looked for in a comment, for prose may speak of it.
_GENERATED = re.compile(
    r"^\s*(?:[#/*;%'\"!<>{()-]|--|dnl|REM\b).{0,200}(?:"
    r"auto-?\s?generated|automatically\s+generated|machine[- ]generated|"
    r"@generated\b|generated\s+(?:by|from|with|using|automatically)\b|"
    r"this\s+file\s+(?:is|was|has\s+been)\s+generated|code\s+generated\b|"
    r"do\s+not\s+(?:edit|modify|change)\b"
    r")",
    re.IGNORECASE | re.MULTILINE,
)
_HEAD_LINES = 20
# Long runs that no person types: base64, hexadecimal, escaped bytes, lists of numbers.
_ENCODED = re.compile(
    r"(?:[A-Za-z0-9+/]{64,}={0,2})|(?:(?:\\x[0-9A-Fa-f]{2}){16,})|"
    r"(?:(?:0[xX][0-9A-Fa-f]{1,16},\s{0,8}){8,})|(?:(?:-?\d{1,12}(?:\.\d{1,12})?,\s{0,8}){32,})"
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
_MAXIMUM_CONTROL = 0.01


class CodeStage:
    """Drops source code that is of no use to learn from.

    Attributes:
        counts: nothing; a stage has it.
    """

    def __init__(self, options: CodeSection) -> None:
        self.counts: Counter[str] = Counter()
        self._options = options

    def apply(self, text: str) -> str | Drop:
        """Return `text` as it is, or why it is dropped."""
        options = self._options
        if len(_CONTROL.findall(text)) > _MAXIMUM_CONTROL * len(text):
            return Drop("binary-like")
        lines = text.splitlines() or [""]
        if options.drop_generated and _GENERATED.search("\n".join(lines[:_HEAD_LINES])[:8000]):
            return Drop("generated")
        if max(map(len, lines)) > options.maximum_line_characters:
            return Drop("minified: a very long line")
        if sum(map(len, lines)) > options.maximum_mean_line_characters * len(lines):
            return Drop("minified: long lines")
        encoded = sum(match.end() - match.start() for match in _ENCODED.finditer(text))
        if encoded > options.maximum_encoded * len(text):
            return Drop("encoded data")
        if sum(map(str.isalnum, text)) < options.minimum_alphanumeric * len(text):
            return Drop("few letters and digits")
        return text
