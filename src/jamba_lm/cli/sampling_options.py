"""The options that say how tokens are picked, shared by the commands that pick tokens.

A value that is not given comes from the checkpoint's generation_config.json, and what that does not
say from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jamba_lm.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from jamba_lm.sampling import Sampling

DEFAULTS: Mapping[str, float | int | None] = {
    "temperature": 0.8,
    "top_k": None,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
DEFAULT_PREFILL_TOKENS = 512
# Each of these says that tokens are to be drawn, whatever do_sample in the file says.
ASK_FOR_DRAWS = ("temperature", "top_k", "top_p", "min_p")


def _otherwise(name: str) -> str:
    return f"Otherwise what the model's generation_config.json says, or {DEFAULTS[name]}."


TemperatureOption = Annotated[
    float | None,
    typer.Option(
        help=f"0 takes the likeliest token; higher is more varied. {_otherwise('temperature')}",
        show_default=False,
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="Pick among this many likeliest tokens. Otherwise what the model's "
        "generation_config.json says, or all.",
        show_default=False,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Pick among the likeliest tokens that together have this probability. "
        f"{_otherwise('top_p')}",
        show_default=False,
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        help="Pick among tokens at least this fraction as likely as the likeliest. "
        f"{_otherwise('min_p')}",
        show_default=False,
    ),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(
        help="Divides the logits of tokens already read or written; 1 is off. "
        f"{_otherwise('repetition_penalty')}",
        show_default=False,
    ),
]
PresenceOption = Annotated[
    float | None,
    typer.Option(
        help="Taken from the logits of tokens already written; 0, which is off, when left out.",
        show_default=False,
    ),
]
FrequencyOption = Annotated[
    float | None,
    typer.Option(
        help="The same, for every time a token was written; 0, which is off, when left out.",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        help="Same seed, same text. A fresh one, which is printed, when left out.",
        show_default=False,
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Stop after this many new tokens.")]
PrefillOption = Annotated[
    int, typer.Option(help="Tokens of the prompt to read at once; bounds the memory it takes.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Stop before this text; may be given several times.",
        show_default=False,
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="lookup",
        help="Guess tokens from what followed the last ones before, and check several at once: the "
        "same text, sooner where it repeats some (lookup).",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class ChosenSampling:
    """How tokens will be picked, and who said so.

    Attributes:
        sampling: with a seed.
        sources: for each value "option", "generation_config.json" or "default".
    """

    sampling: Sampling
    sources: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {**asdict(self.sampling), "sources": dict(self.sources)}


def choose_sampling(
    folder: Path, *, seed: int | None, **given: float | int | None
) -> ChosenSampling:
    """Put together what was given, what the checkpoint in `folder` says, and the defaults.

    Args:
        folder: the checkpoint.
        seed: that of the option; a fresh one when None.
        given: the options, by their names in `Sampling`; None for those left out.

    Raises:
        InputError: an option is out of its range.
        CheckpointError: a value of generation_config.json is.
    """
    from jamba_lm.checkpoint.generation_config import FILE, read_sampling_defaults
    from jamba_lm.sampling import Sampling, fresh_seed

    options = {name: value for name, value in given.items() if value is not None}
    # Before the file is opened, so that its mistakes are told apart from those of the options.
    Sampling(**options, seed=seed)  # type: ignore[arg-type]
    stated = read_sampling_defaults(folder)
    if stated.get("temperature") == 0 and any(name in options for name in ASK_FOR_DRAWS):
        # The file says not to draw, and an option says how.
        del stated["temperature"]
    try:
        Sampling(**stated)  # type: ignore[arg-type]
    except InputError as error:
        raise CheckpointError(f"{str(folder / FILE)!r}: {error}") from error
    chosen = {**DEFAULTS, **stated, **options}
    sources = {
        name: "option" if name in options else FILE if name in stated else "default"
        for name in DEFAULTS
    }
    sources["seed"] = "default" if seed is None else "option"
    seed = fresh_seed() if seed is None else seed
    return ChosenSampling(Sampling(**chosen, seed=seed), sources)  # type: ignore[arg-type]
