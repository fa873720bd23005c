"""The texts of one column of a Parquet file, a few rows at a time.

The only file that imports pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jamba_lm.corpus.compressed import BrokenFile
from jamba_lm.errors import BackendUnavailable

BATCH_ROWS = 256


def texts(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text of each row; None where there is none.

    Raises:
        BrokenFile: it is no Parquet file, is damaged, or has no such column of text.
        BackendUnavailable: pyarrow is missing.
        OSError: the system refused.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as cause:
        raise BackendUnavailable(
            f"{str(path)!r} is Parquet: install the package for it with "
            "`pip install 'jamba-lm[data]'`"
        ) from cause
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise BrokenFile(
                    f"no column {column!r} among {', '.join(table.schema_arrow.names)}"
                )
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield value if isinstance(value, str) else None
        except pyarrow.ArrowException as cause:
            raise BrokenFile(f"parquet: {' '.join(str(cause).split())[:200]}") from cause
