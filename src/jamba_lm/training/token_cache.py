"""Tokenized documents kept beside a run, so that resuming it does not tokenize again.

Knows files and tokens, and nothing of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from jamba_lm.data import TokenizedDocuments
from jamba_lm.errors import CheckpointError, DataError
from jamba_lm.tensor_file import TensorFile, write_tensors
from jamba_lm.text.tokenizer import Tokenizer

FORMAT = "jamba_lm tokens 1"


def tokenized(
    paths: Sequence[Path], tokenizer: Tokenizer, tokenizer_file: Path, *, cache: Path, what: str
) -> TokenizedDocuments:
    """Return the documents of `paths`, from `cache` when it was made from these very files.

    Args:
        paths: files that `data.read_documents` takes.
        tokenizer: what tokenizes.
        tokenizer_file: where it was read from.
        cache: file to keep the tokens in; replaced when text or tokenizer are others.
        what: what the text is for, for messages.

    Raises:
        DataError: text is missing or unusable.
        InputError: the cache cannot be written.
    """
    key = _fingerprint([*paths, tokenizer_file])
    try:
        with TensorFile(cache) as file:
            if file.metadata.get("format") == FORMAT and file.metadata.get("key") == key:
                ids, starts, num_bytes = (
                    file.tensor(name).clone().numpy() for name in ("ids", "starts", "num_bytes")
                )
                return TokenizedDocuments(ids, starts, num_bytes, int(file.metadata["bos_id"]))
    except CheckpointError:
        # Missing or damaged: it holds nothing that cannot be made again.
        pass
    documents = TokenizedDocuments.read(paths, tokenizer, what)
    metadata = {"format": FORMAT, "key": key, "bos_id": str(documents.bos_id)}
    write_tensors(cache, documents.tensors(), metadata)
    return documents


def _fingerprint(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as cause:
            raise DataError(f"cannot read {str(path)!r}: {cause.strerror or cause}") from cause
    return digest.hexdigest()
