"""The shape that a command is asked about: a checkpoint's, or one known by name.

Reads no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jamba_lm.analysis.comparators import COMPARATORS
from jamba_lm.config import JambaConfig, read_config_json
from jamba_lm.config_json import closest, ignored, shown
from jamba_lm.errors import ConfigError
from jamba_lm.files import path_kind
from jamba_lm.gguf_file import is_gguf
from jamba_lm.presets import PRESETS
from jamba_lm.quantization.policy import read_scheme

if TYPE_CHECKING:
    from jamba_lm.checkpoint.gguf_storage import GgufContents

ShapeArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_PRESET",
        help="A checkpoint folder, a config.json, a .gguf file, or a name: "
        f"{', '.join(PRESETS)}; to compare with: {', '.join(COMPARATORS)}.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change one number of the shape, such as num_layers=16; may be repeated.",
        show_default=False,
    ),
]


def open_shape(name: str, assignments: list[str] | None) -> tuple[JambaConfig, dict[str, str]]:
    """Return the shape called `name`, changed as asked, and the keys of its file without effect.

    A name that is known wins over a folder: write `./tiny` for a folder called tiny.

    Raises:
        ConfigError: no such name and no such checkpoint; or the change is impossible.
        CheckpointError: a GGUF file that is damaged, or not a Jamba model.
    """
    known = {**COMPARATORS, **PRESETS}
    without_effect: dict[str, str] = {}
    if name in known:
        config = known[name]
    elif is_gguf(name):
        from jamba_lm.checkpoint.gguf_config import load_gguf_config

        config = load_gguf_config(name)
    elif path_kind(name) != "missing":
        values = read_config_json(name)
        config, without_effect = JambaConfig.from_hf(values), ignored(values)
    else:
        raise ConfigError(
            f"no model {shown(name)}: expected a checkpoint folder, or one of "
            f"{', '.join(known)}{closest(name, known)}"
        )
    return config.with_set(assignments or []), without_effect


def gguf_contents(name: str) -> GgufContents | None:
    """Return what a GGUF file holds; None for any other model.

    Raises:
        CheckpointError: a GGUF file that is damaged.
    """
    if name in {**COMPARATORS, **PRESETS} or not is_gguf(name):
        return None
    from jamba_lm.checkpoint.gguf_storage import read_contents

    return read_contents(name)


def stored_format(name: str) -> str | None:
    """Return the format that a quantised checkpoint's weights have, or None for any other model.

    Raises:
        CheckpointError: config.json says of its quantisation what this version does not know.
    """
    if name in {**COMPARATORS, **PRESETS} or is_gguf(name) or path_kind(name) == "missing":
        return None
    scheme = read_scheme(read_config_json(name), f"config.json of {shown(name)}")
    return None if scheme is None else scheme.label
