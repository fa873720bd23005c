"""The language of a text, as a fastText model that the user brings sees it.

The only file that imports fasttext. Nothing is downloaded.
"""

from __future__ import annotations

from collections import Counter

from jamba_lm.corpus.document import Drop
from jamba_lm.corpus.recipe import LanguageSection
from jamba_lm.errors import BackendUnavailable, DataError

_LABEL = "__label__"


class LanguageStage:
    """Keeps texts of some languages.

    Attributes:
        counts: how many texts of each language were seen.
    """

    def __init__(self, options: LanguageSection) -> None:
        """Load the model.

        Raises:
            BackendUnavailable: fasttext is missing.
            DataError: the model file is, or it is none, or knows a language that is kept not.
        """
        try:
            import fasttext
        except ImportError as cause:
            raise BackendUnavailable(
                "stage 'language' needs fasttext: install it with `pip install 'jamba-lm[data]'`"
            ) from cause
        try:
            self._model = fasttext.load_model(options.model)
        # The library says all of it with a ValueError.
        except ValueError as cause:
            raise DataError(
                f"language.model {options.model!r} is no fastText model: "
                f"{' '.join(str(cause).split())[:120]}"
            ) from cause
        self.counts: Counter[str] = Counter()
        self._options = options
        known = {label.removeprefix(_LABEL) for label in self._model.get_labels()}
        for one in options.keep:
            if one not in known:
                raise DataError(
                    f"language.keep names {one!r}, which {options.model!r} does not know; its "
                    f"labels are {', '.join(sorted(known)[:20])}..."
                )

    def apply(self, text: str) -> str | Drop:
        """Return `text` as it is, or why it is dropped."""
        # The library reads one line.
        labels, scores = self._model.predict(" ".join(text.split()))
        if not labels:
            return Drop("language unknown")
        language, score = labels[0].removeprefix(_LABEL), float(scores[0])
        self.counts[language] += 1
        if language not in self._options.keep:
            return Drop(f"language {language}")
        if score < self._options.minimum_score:
            return Drop("language uncertain")
        return text
