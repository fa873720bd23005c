"""What a quantisation scheme makes of a model: which matrices become what, and their bytes.

Needs no torch. The sum is that of `memory.weight_bytes`, and that of the weight files.
"""

from __future__ import annotations

from dataclasses import dataclass

from jamba_lm.analysis.tensors import TensorGroup, list_tensors
from jamba_lm.config import JambaConfig
from jamba_lm.quantization.policy import Packing, Scheme, matrix_class

REST = "the rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPart:
    """The matrices of one class that are kept in one way.

    Attributes:
        matrices: their class, or `REST` for all that is not packed.
        kind: "int8", "int4 by 64", "int4 by 32" or "as it is".
        values: how many numbers they hold together.
        num_bytes: what they take.
    """

    matrices: str
    kind: str
    values: int
    num_bytes: int


def packed_parts(config: JambaConfig, scheme: Scheme, bytes_per_value: int) -> list[PackedPart]:
    """List the parts of a quantised model.

    Args:
        config: the model.
        scheme: what is packed.
        bytes_per_value: of what is not packed, A_log and D apart, which are float32.
    """
    sums: dict[tuple[str, str], list[int]] = {}
    for group in list_tensors(config):
        packing = scheme.packing(group.name, group.shape)
        matrices = REST if packing is None else str(matrix_class(group.name))
        entry = sums.setdefault((matrices, _kind(packing)), [0, 0])
        entry[0] += group.copies * group.values
        entry[1] += group.copies * _num_bytes(group, packing, bytes_per_value)
    return [
        PackedPart(matrices=matrices, kind=kind, values=values, num_bytes=num_bytes)
        for (matrices, kind), (values, num_bytes) in sums.items()
    ]


def _kind(packing: Packing | None) -> str:
    if packing is None:
        return "as it is"
    return packing.type if packing.group is None else f"{packing.type} by {packing.group}"


def _num_bytes(group: TensorGroup, packing: Packing | None, bytes_per_value: int) -> int:
    if packing is not None:
        return packing.num_bytes(group.shape)
    return (4 if group.wide else bytes_per_value) * group.values
