"""What a checkpoint's authors want tokens to be picked with: generation_config.json.

Reads what is said and nothing else; which ids end a text is read in `text/special_tokens.py`.
"""

from __future__ import annotations

from pathlib import Path

from jamba_lm.config_json import shown
from jamba_lm.errors import CheckpointError
from jamba_lm.files import path_kind, read_json

FILE = "generation_config.json"
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def read_sampling_defaults(folder: Path) -> dict[str, float | int | None]:
    """Return the sampling values that the file in `folder` states, by their names in `Sampling`.

    `do_sample` false is a temperature of 0, whatever else is stated; a `top_k` of 0 or -1, with
    which other programs say "all", is None. What the file leaves out or sets to null is not there.

    Raises:
        CheckpointError: the file is damaged, or a value is not of its kind.
    """
    if path_kind(folder / FILE) == "missing":
        return {}
    values = read_json(folder / FILE, "generation settings", CheckpointError)

    def wrong(key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{str(folder / FILE)!r}: {key} is {shown(values[key])}, expected {expected}"
        )

    found: dict[str, float | int | None] = {}
    for key in NUMBERS:
        value = values.get(key)
        if value is not None:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise wrong(key, "a number")
            found[key] = value
    top_k = values.get("top_k")
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool):
            raise wrong("top_k", "a whole number")
        found["top_k"] = None if top_k in (0, -1) else top_k
    do_sample = values.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise wrong("do_sample", "true or false")
    if do_sample is False:
        found["temperature"] = 0
    return found
