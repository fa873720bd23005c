"""Documents out of whatever datatrove has a reader for: WARC, CSV, Arrow, buckets, the hub.

What its reader leaves out by itself is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jamba_lm.config_json import closest, shown
from jamba_lm.corpus.document import Document, Unusable
from jamba_lm.corpus.reading import check_text
from jamba_lm.corpus.recipe import DocumentsSection, Source
from jamba_lm.errors import BackendUnavailable, DataError, RecipeError


def _reader(source: Source) -> Any:
    try:
        from datatrove.pipeline import readers
    except ImportError as cause:
        raise BackendUnavailable(
            f"source {source.name!r} needs datatrove: install it with "
            "`pip install 'jamba-lm[data]'`"
        ) from cause
    known = [name for name in dir(readers) if name.endswith("Reader")]
    if source.reader not in known:
        hint = closest(source.reader, known) or f"; known: {', '.join(known)}"
        raise RecipeError(f"datatrove has no reader {shown(source.reader)}{hint}")
    try:
        return getattr(readers, source.reader)(**source.reader_options)
    # datatrove says with an ImportError what else a reader needs.
    except (TypeError, ValueError, ImportError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise RecipeError(f"source {source.name!r}: {source.reader} says: {reason}") from cause


def list_inputs(source: Source) -> list[tuple[str, int]]:
    """List what the reader would read, with sizes; one nameless input if it has no files.

    Raises:
        RecipeError: there is no such reader, or it takes no such options.
        DataError: it cannot be listed.
    """
    reader = _reader(source)
    folder = getattr(reader, "data_folder", None)
    if folder is None:
        return [("", 0)]
    try:
        paths = folder.list_files(recursive=reader.recursive, glob_pattern=reader.glob_pattern)
        return [(path, int(folder.size(path) or 0)) for path in paths]
    except OSError as cause:
        raise DataError(f"source {source.name!r}: cannot list its files: {cause}") from cause


def read_input(
    path: str, source: Source, limits: DocumentsSection
) -> Iterator[Document | Unusable]:
    """Yield the documents of one input.

    Raises:
        DataError: it cannot be read.
    """
    reader = _reader(source)
    documents = reader.read_file(path) if path else reader.run()
    name = path or source.reader
    try:
        for position, document in enumerate(documents):
            # What its readers found no text in comes as None.
            if document is None:
                detail = f"no text under {reader.text_key!r}"
                yield Unusable("no text", f"{name}:{position + 1}", detail, 0)
            else:
                yield check_text(document.text, position, f"{name}:{position + 1}", limits)
    except (OSError, EOFError, ValueError, ImportError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise DataError(f"source {source.name!r}: cannot read {name!r}: {reason}") from cause
