"""Which matrix is kept in how many bits, under which scheme: a table, and the arithmetic of bytes.

Needs no torch, so that planning and the weight files agree by reading the same table. The numbers
behind each entry are in docs/quantization.md, measured by benchmarks/quantization.py.

O outputs (rows of a matrix), I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from jamba_lm.config_json import QUANTIZATION_METHOD, closest, shown
from jamba_lm.errors import CheckpointError, InputError
from jamba_lm.kernels.native_structs import RowRounding

MatrixClass = Literal[
    "experts", "MLP", "in_proj", "out_proj", "x_proj", "attention", "embedding", "head"
]
Type = Literal["int8", "int4"]

# Inputs that share a scale and a minimum in 4 bits.
GROUPS = (64, 32)

# Matrices by the last word of their name, experts apart. What is not here stays as it is in every
# scheme: the convolution, A_log, D, norms and biases are no matrices of a linear layer; the router
# picks experts by small differences; dt_proj feeds an exponential and is 0.7 % of a model at most.
_CLASSES: Mapping[str, MatrixClass] = MappingProxyType(
    {
        "gate_proj": "MLP",
        "up_proj": "MLP",
        "down_proj": "MLP",
        "in_proj": "in_proj",
        "out_proj": "out_proj",
        "x_proj": "x_proj",
        "q_proj": "attention",
        "k_proj": "attention",
        "v_proj": "attention",
        "o_proj": "attention",
        "embedding": "embedding",
        "head": "head",
    }
)
_MATRIX = re.compile(r"(?:.*\.)?([a-z]+(?:_proj)?)\.weight", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Packing:
    """How one matrix is kept.

    Attributes:
        type: "int8", one float32 scale per row; or "int4", two bfloat16 numbers per group.
        group: inputs that share them in "int4"; None in "int8".
    """

    type: Type
    group: int | None = None

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name, type and shape of the tensors that a matrix `[O, I]` is kept in.

        The types are torch's names; the layouts are those of `kernels/packed_weights.py`.
        """
        outputs, inputs = shape
        if self.group is None:
            return {"values": ("int8", (outputs, inputs)), "scale": ("float32", (outputs,))}
        groups = (outputs, inputs // self.group)
        return {
            "packed": ("uint8", (outputs, inputs // 2)),
            "scale": ("bfloat16", groups),
            "minimum": ("bfloat16", groups),
        }

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the size of a matrix `[O, I]`, exactly.

        >>> Packing("int8").num_bytes((10, 64)), Packing("int4", 64).num_bytes((10, 64))
        (680, 360)
        """
        outputs, inputs = shape
        if self.group is None:
            return outputs * (inputs + 4)
        return outputs * (inputs // 2 + inputs // self.group * 4)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named choice of types for all matrices of a model.

    Attributes:
        name: one of `SCHEMES`.
        group: for schemes with 4 bits, the inputs that share a scale in them.
    """

    name: str
    group: int | None = None

    @property
    def label(self) -> str:
        """Its name, with the group where that is not the usual one."""
        usual = self.group in (None, GROUPS[0])
        return self.name if usual else f"{self.name}-{self.group}"

    @property
    def description(self) -> str:
        """What it does, for a person."""
        text = DESCRIPTIONS[self.name]
        return text if self.group is None else f"{text}, groups of {self.group}"

    def packing(self, name: str, shape: Sequence[int]) -> Packing | None:
        """Return how the tensor `name` is kept, or None when it stays as it is.

        In 4 bits the inputs must divide into groups: where those of the scheme do not fit, groups
        of 32 are taken, and 8 bits where these do not fit either.

        Args:
            name: the parameter's name in the decoder, or in `analysis/tensors.py`.
            shape: its shape.
        """
        matrix = matrix_class(name)
        kind = None if matrix is None else SCHEMES[self.name].get(matrix)
        if matrix is None or kind is None:
            return None
        if kind == "int4":
            assert self.group is not None
            for fits in (self.group, min(GROUPS)):
                if shape[1] % fits == 0:
                    return Packing("int4", fits)
        return Packing("int8")

    def rounds_rows(self, name: str) -> RowRounding:
        """Say whether rows that meet the matrix `name` may be rounded to 8 bits as well.

        Only a prefill does so, of a model in bfloat16, on processors that multiply such numbers
        faster than others.
        """
        match = _MATRIX.fullmatch(name)
        rows = ROUNDED_ROWS[self.name]
        return RowRounding.NONE if match is None else rows.get(match[1], RowRounding.NONE)

    def to_json(self) -> dict[str, Any]:
        """Return what `config.json` says of it under "quantization_config"."""
        content: dict[str, Any] = {"quant_method": QUANTIZATION_METHOD, "scheme": self.name}
        return content if self.group is None else {**content, "group_size": self.group}


_FEED_FORWARD: tuple[MatrixClass, ...] = ("experts", "MLP")
_MIXERS: tuple[MatrixClass, ...] = ("in_proj", "out_proj", "attention")
_SENSITIVE: tuple[MatrixClass, ...] = ("x_proj", "embedding", "head")


def _kinds(bits: Type, classes: Sequence[MatrixClass]) -> dict[MatrixClass, Type]:
    return dict.fromkeys(classes, bits)


SCHEMES: Mapping[str, Mapping[MatrixClass, Type]] = MappingProxyType(
    {
        # The recipe of Jamba-1.5 (arXiv 2408.12570, section 3.1): MoE and MLP weights, no more.
        "experts-int8": _kinds("int8", _FEED_FORWARD),
        "int8": _kinds("int8", get_args(MatrixClass)),
        # Experts are most of a model, and a token meets few of them: of the damage that 4 bits do
        # to 50 million parameters they do a fortieth, with three quarters of the weights.
        "experts-int4": _kinds("int8", get_args(MatrixClass)) | _kinds("int4", ("experts",)),
        # Embedding and head do two thirds of the damage of 4 bits with a tenth of the weights.
        "int4": _kinds("int4", _FEED_FORWARD + _MIXERS) | _kinds("int8", _SENSITIVE),
    }
)
# Matrices by the last word of their name, experts included. What meets out_proj and down_proj are
# products of two activations, whose largest value is far above the rest: with one scale for a row
# they do most of the damage of all together on a dense 3B. With one for 64 inputs down_proj does no
# more than others do, and out_proj still more than all others. x_proj is too small to gain by it.
# The recipe of "experts-int8" keeps activations in bfloat16.
_NORMALISED = ("gate_proj", "up_proj", "in_proj", "q_proj", "k_proj", "v_proj")
ROUNDED_ROWS: Mapping[str, Mapping[str, RowRounding]] = MappingProxyType(
    {
        "experts-int8": {},
        "int8": {
            **dict.fromkeys((*_NORMALISED, "o_proj"), RowRounding.BY_ROW),
            "down_proj": RowRounding.BY_GROUP,
        },
        # Experts and MLP have the same names; rows that meet 4 bits are rounded by group.
        "experts-int4": {
            **dict.fromkeys((*_NORMALISED, "o_proj"), RowRounding.BY_ROW),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), RowRounding.BY_GROUP),
        },
        "int4": dict.fromkeys((*_NORMALISED, "o_proj", "down_proj"), RowRounding.BY_GROUP),
    }
)
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "experts-int8": "experts and MLP in 8 bits",
        "int8": "all large matrices in 8 bits",
        "experts-int4": "experts in 4 bits; all other large matrices in 8",
        "int4": "large matrices in 4 bits; embedding, head and x_proj in 8",
    }
)


def matrix_class(name: str) -> MatrixClass | None:
    """Return which class of matrix a parameter belongs to, or None for what is never packed.

    >>> matrix_class("blocks.1.feed_forward.experts.3.up_proj.weight")
    'experts'
    >>> matrix_class("blocks.1.feed_forward.router.weight") is None
    True
    """
    match = _MATRIX.fullmatch(name)
    found = None if match is None else _CLASSES.get(match[1])
    return "experts" if found == "MLP" and ".experts." in name else found


def all_schemes() -> tuple[Scheme, ...]:
    """List every scheme there is."""
    return tuple(
        Scheme(name, group)
        for name, kinds in SCHEMES.items()
        for group in (GROUPS if "int4" in kinds.values() else (None,))
    )


def find_scheme(name: str, group: int | None = None) -> Scheme:
    """Return the scheme called `name`.

    >>> find_scheme("int4", 32) == find_scheme("int4-32")
    True

    Args:
        name: the name or the label of a scheme.
        group: for schemes with 4 bits, inputs that share a scale; `GROUPS[0]` when None.

    Raises:
        InputError: there is none, or `group` is not one of `GROUPS` or not for this scheme.
    """
    by_label = {scheme.label: scheme for scheme in all_schemes()}
    if name not in by_label:
        raise InputError(
            f"no quantisation scheme {shown(name)}: expected one of {', '.join(by_label)}"
            f"{closest(name, by_label)}"
        )
    if group is None:
        return by_label[name]
    if name not in SCHEMES or "int4" not in SCHEMES[name].values():
        four = " and ".join(one for one, kinds in SCHEMES.items() if "int4" in kinds.values())
        raise InputError(
            f"a group of {group} was given with scheme {name!r}: it goes with 4 bits alone, which "
            f"{four} have"
        )
    if group not in GROUPS:
        raise InputError(
            f"the group is {group}: expected one of {', '.join(map(str, sorted(GROUPS)))}"
        )
    return Scheme(name, group)


def read_scheme(values: Mapping[str, Any], where: str) -> Scheme | None:
    """Return the scheme that the content of a `config.json` names, or None where it has none.

    Every key and value must be one that `Scheme.to_json` writes: a file that says more was written
    by a version that computes something else.

    Args:
        values: the content of `config.json`.
        where: the file, for messages.

    Raises:
        CheckpointError: an unknown key, method, scheme or group.
    """
    given = values.get("quantization_config")
    if given is None:
        return None

    def reject(reason: str) -> CheckpointError:
        return CheckpointError(
            f"{where} has a quantization_config that cannot be honoured: {reason}; "
            "was it written by a newer version, or changed by hand?"
        )

    if not isinstance(given, dict) or given.get("quant_method") != QUANTIZATION_METHOD:
        raise reject(f"it is not of method {QUANTIZATION_METHOD!r}")
    name, group = given.get("scheme"), given.get("group_size")
    if not isinstance(name, str) or name not in SCHEMES:
        raise reject(f"scheme is {shown(name)}, expected one of {', '.join(SCHEMES)}")
    if group is not None and not (isinstance(group, int) and group in GROUPS):
        raise reject(f"group_size is {shown(group)}, expected one of {sorted(GROUPS)}")
    scheme = find_scheme(name)
    if group is not None and scheme.group is not None:
        scheme = Scheme(name, group)
    expected = scheme.to_json()
    for key in [*given, *expected]:
        if key not in expected:
            raise reject(f"{shown(key)} says nothing under {name!r}{closest(key, expected)}")
        if key not in given:
            raise reject(f"{key} is missing")
    return scheme
