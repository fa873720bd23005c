"""Finds the answers in a conversation as a chat template writes it, to the character.

Knows texts and roles, and nothing of tokens.

An answer is what the model has to write: it starts where the template, asked for an answer, would
stop, and ends where the template has written it out. Both are found by rendering the conversation
up to there, so that a template which trims a message or adds a line break is understood as it is.
Where the text so far is not the beginning of the whole, no place in the whole is the right one, and
that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jamba_lm.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class ChatPart:
    """A stretch of a conversation as ids.

    Attributes:
        ids: token ids; no token reaches over the end of a part.
        num_learned: how many of the first ones an answer is made of, the token that ends it
            included; 0 where somebody else speaks.
    """

    ids: list[int]
    num_learned: int


def answer_spans(
    whole: str, roles: Sequence[str], render: Callable[[int, bool], str], *, last_only: bool
) -> list[tuple[int, int]]:
    """Return where the answers of the assistant start and end in `whole`, in order.

    Args:
        whole: the conversation, rendered.
        roles: of its messages.
        render: the first so many messages, with or without the beginning of an answer.
        last_only: only the last answer is asked for.

    Raises:
        TokenizerError: there is no answer, or the template does not write a conversation as the
            beginning of a longer one.
    """
    turns = [number for number, role in enumerate(roles) if role == "assistant"]
    if not turns:
        raise TokenizerError(
            "the conversation holds no message of the assistant: there is nothing to learn from it"
        )
    spans: list[tuple[int, int]] = []
    for number in turns[-1:] if last_only else turns:
        before, after = render(number, True), render(number + 1, False)
        what = f"messages[{number}]"
        if not after.startswith(before):
            raise TokenizerError(
                f"{what}: the chat template does not write this answer after what it writes when "
                f"asked for one (they part at character {_parting(before, after):,}), so it cannot "
                "be told from the prompt; use a template whose add_generation_prompt begins its "
                "own assistant message"
            )
        if not whole.startswith(after):
            raise TokenizerError(
                f"{what}: the chat template writes this turn in another way once more follow (from "
                f"character {_parting(after, whole):,} on), so not all answers can be learned from "
                'one text; set data.answers = "last", or split the conversation'
            )
        spans.append((len(before), len(after)))
    return spans


def _parting(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
