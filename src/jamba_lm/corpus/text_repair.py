"""Text with broken encodings mended: the only file that imports ftfy.

Knows no files.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from jamba_lm.corpus.recipe import FixTextSection
from jamba_lm.errors import BackendUnavailable


class FixTextStage:
    """Undoes what wrong decoding, terminals and web pages have done to a text.

    What only looks unusual stays: ligatures, wide characters, HTML entities inside of HTML. Line
    ends become newlines.

    Attributes:
        counts: how many texts were changed.
    """

    def __init__(self, options: FixTextSection) -> None:
        """Prepare.

        Raises:
            BackendUnavailable: ftfy is missing.
        """
        try:
            import ftfy
        except ImportError as cause:
            raise BackendUnavailable(
                "stage 'fix_text' needs ftfy: install it with `pip install 'jamba-lm[data]'`"
            ) from cause
        self.counts: Counter[str] = Counter()
        self._fix = ftfy.fix_text
        form: Any = None if options.normalization == "none" else options.normalization
        self._config = ftfy.TextFixerConfig(
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=options.uncurl_quotes,
            normalization=form,
            explain=False,
        )

    def apply(self, text: str) -> str:
        """Return the mended text.

        >>> FixTextStage(FixTextSection()).apply("voilÃ  le travail")
        'voilà le travail'
        """
        fixed: str = self._fix(text, config=self._config)
        self.counts["changed"] += fixed != text
        return fixed
