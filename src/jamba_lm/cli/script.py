"""How the messages of a conversation become one growing sequence that a model reads.

Knows tokenizers and chat templates; knows nothing about models and their states.
"""

from __future__ import annotations

from typing import Any, Protocol

from jamba_lm.text.tokenizer import Tokenizer

Message = dict[str, str]


class Script(Protocol):
    """How messages become what a model reads. What `whole` returns is its own affair."""

    def whole(self, messages: list[Message]) -> Any:
        """Return all that there is to read before the next answer."""

    def nothing(self) -> Any:
        """Return the script in which nothing was said."""

    def rest(self, whole: Any, asked: Any, said: str | None) -> list[int] | None:
        """Return the ids of `whole` behind `asked` and the answer `said`.

        None when `whole` does not begin with them: something was rewritten.
        """


class ChatScript:
    """Messages as the checkpoint's chat template writes them, in ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, messages: list[Message]) -> list[int]:
        """Return the ids of the conversation, up to where the answer begins."""
        return self._tokenizer.chat_ids(messages)

    def nothing(self) -> list[int]:
        """Return no ids."""
        return []

    def rest(self, whole: list[int], asked: list[int], said: str | None) -> list[int] | None:
        """Return the ids behind an answer, from the token on with which the template ends it."""
        if whole[: len(asked)] != asked:
            return None
        rest = whole[len(asked) :]
        if said is None:
            return rest
        # No message can hold such a token: chat_ids spells its name out in ordinary ones.
        ends = [place for place, token in enumerate(rest) if token in self._tokenizer.eos_ids]
        if not ends:
            return None
        answer = self._tokenizer.decode(rest[: ends[0]])
        # Many templates trim answers. The state keeps the white space that the model wrote.
        return rest[ends[0] :] if answer.strip() == said.strip() else None


class PlainScript:
    """One growing text, for models that only continue texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, messages: list[Message]) -> str:
        """Return the text: what the user wrote begins a new line, the model goes on from there."""
        text = ""
        for message in messages:
            if message["role"] == "user" and text:
                text += "\n"
            text += message["content"]
        return text

    def nothing(self) -> str:
        """Return no text."""
        return ""

    def rest(self, whole: str, asked: str, said: str | None) -> list[int] | None:
        """Return the ids of the text behind the answer."""
        read = asked + (said or "")
        if not whole.startswith(read):
            return None
        return self._tokenizer.encode(
            # A BOS stands at the very beginning or nowhere.
            whole[len(read) :],
            add_bos=None if not asked and said is None else False,
        )
