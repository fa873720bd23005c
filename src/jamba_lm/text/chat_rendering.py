"""Renders a conversation, whole or its beginning, in which only the template makes control tokens.

Knows nothing about token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jamba_lm.text.chat_template import ChatTemplate, Message, check_messages, plain_data
from jamba_lm.text.control_tokens import AddedTokenFinder, unused_mark


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation whose texts are disarmed, ready to be written by its template.

    Attributes:
        template: writes it.
        messages: disarmed.
        tools: disarmed.
        variables: disarmed.
        now: the clock for templates that write the date.
        mark: what stands within the names of control tokens that messages hold.
    """

    template: ChatTemplate
    messages: list[dict[str, Any]]
    tools: Any
    variables: Any
    now: Callable[[], datetime]
    mark: str

    def text(self, count: int, add_generation_prompt: bool) -> str:
        """Return what the template makes of the first `count` messages, marks included.

        Raises:
            InputError: the template refuses the messages.
            TokenizerError: it fails or exceeds its bounds.
        """
        return self.template.render(
            self.messages[:count],
            add_generation_prompt=add_generation_prompt,
            tools=self.tools,
            variables=self.variables,
            now=self.now,
        )


def prepare(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    now: Callable[[], datetime],
    controls: AddedTokenFinder,
    answer_markup: frozenset[str],
) -> Rendering:
    """Check a conversation and put a mark into every name of a control token in it.

    Args:
        template: writes it.
        messages: objects with a `role` and a `content`.
        tools: JSON schemas of what the model may call.
        variables: more variables for the template.
        now: the clock.
        controls: finds the names.
        answer_markup: those that an answer of the assistant may hold.

    Raises:
        InputError: the messages are malformed.
    """
    checked = check_messages(messages)
    schemas = None if tools is None else plain_data(list(tools), "tools")
    values = plain_data(dict(variables or {}), "template variables")
    mark = unused_mark([checked, schemas, values])

    def disarmed(value: Any, allowed: frozenset[str] = frozenset()) -> Any:
        """Return plain data with every text in it disarmed, keys included."""
        if isinstance(value, str):
            return controls.disarmed(value, mark, allowed)
        if isinstance(value, dict):
            return {
                controls.disarmed(key, mark, allowed): disarmed(one, allowed)
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [disarmed(one, allowed) for one in value]
        return value

    said = [
        disarmed(one, answer_markup if one["role"] == "assistant" else frozenset())
        for one in checked
    ]
    return Rendering(template, said, disarmed(schemas), disarmed(values), now, mark)
