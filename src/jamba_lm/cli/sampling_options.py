"""The options that say how tokens are picked, shared by the commands that pick tokens."""

from __future__ import annotations

from typing import Annotated

import typer

TemperatureOption = Annotated[
    float, typer.Option(help="0 takes the likeliest token; higher is more varied.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="Pick among this many likeliest tokens; all when left out.", show_default=False
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(help="Pick among the likeliest tokens that together have this probability."),
]
MinPOption = Annotated[
    float,
    typer.Option(help="Pick among tokens at least this fraction as likely as the likeliest."),
]
RepetitionOption = Annotated[
    float, typer.Option(help="Divides the logits of tokens already read or written; 1 is off.")
]
PresenceOption = Annotated[
    float, typer.Option(help="Taken from the logits of tokens already written; 0 is off.")
]
FrequencyOption = Annotated[
    float, typer.Option(help="The same, for every time a token was written; 0 is off.")
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

DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_P = 0.95
DEFAULT_PREFILL_TOKENS = 512
