"""A sequence's state as a file: written whole, and refused when anything about it is wrong.

Knows the format and its checks, and nothing of what layers keep.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from jamba_lm.errors import StateError
from jamba_lm.tensor_file import TensorFile, write_tensors

FORMAT = "jamba_lm.sequence_state.1"


def write_state(path: Path, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write contiguous tensors, the fingerprint of the model, and a checksum over both."""
    metadata = {"format": FORMAT, "model": fingerprint}
    metadata["sha256"] = _digest(tensors, metadata)
    write_tensors(path, tensors, metadata)


def read_state(
    path: Path, fingerprint: str, like: Mapping[str, Tensor], per_token: Collection[str]
) -> dict[str, Tensor]:
    """Read what `write_state` wrote, as copies that do not depend on the file.

    Args:
        path: the file.
        fingerprint: that of the model which is to go on from this state.
        like: a tensor of the right dtype and shape for each that must be there; "ids" among them.
        per_token: names of those whose first extent is the number of tokens.

    Raises:
        StateError: the file is missing, cut short, altered, not a state, or of another model.
    """
    with TensorFile(path, error=StateError) as file:
        metadata = dict(file.metadata)
        if metadata.get("format") != FORMAT:
            raise StateError(
                f"{path} is not a saved state: its format is {metadata.get('format')!r}, "
                f"expected {FORMAT!r}"
            )
        if metadata.get("model") != fingerprint:
            raise StateError(
                f"{path} was saved by another model (fingerprint "
                f"{str(metadata.get('model'))[:12]!r}, this model has {fingerprint[:12]!r}): load "
                "the model that it belongs to, in the same dtype"
            )
        ids_shape = file.shape("ids") if "ids" in file.names else ()
        num_tokens = ids_shape[0] if len(ids_shape) == 1 else 0
        expected = {
            name: ((num_tokens, *one.shape[1:]) if name in per_token else (*one.shape,), one.dtype)
            for name, one in like.items()
        }
        found = {name: (file.shape(name), file.dtype(name)) for name in file.names}
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise StateError(
                    f"{path} does not hold a state of this model: {name!r} is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
                )
        tensors = {name: file.tensor(name).clone() for name in file.names}
    if _digest(tensors, metadata) != metadata.get("sha256"):
        raise StateError(f"{path} was altered after it was saved: its checksum does not match")
    return tensors


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of all names, shapes, dtypes and bytes, and of who wrote them."""
    digest = sha256()
    for key in ("format", "model"):
        digest.update(f"{key}={metadata.get(key)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
