"""A conversation on disk: what was said in one file, and the state that has read it in another.

Does not know how messages are read.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jamba_lm.cli.script import Message
from jamba_lm.errors import StateError
from jamba_lm.files import make_folder, read_json, write_json

if TYPE_CHECKING:
    from jamba_lm.language_model import LanguageModel
    from jamba_lm.model.state import SequenceState

MESSAGES_FILE = "conversation.json"
FILE_FORMAT = "jamba_lm.conversation.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedConversation:
    """What a conversation is made of.

    Attributes:
        messages: what was said.
        state: what the model remembers.
        unread: the last token, if the state has not read it.
        answered: whether the last message is an answer that the state has read.
    """

    messages: list[Message]
    state: SequenceState
    unread: tuple[int, ...]
    answered: bool


def save_conversation(folder: Path, saved: SavedConversation) -> None:
    """Write a conversation into `folder`, which may hold an older save.

    The state goes into a file with a name of its own, and the file that names it is replaced
    last: whenever this is cut short, the folder holds the older save or the new one.

    Raises:
        InputError: the folder cannot be written.
    """
    make_folder(folder)
    state_file = f"state-{secrets.token_hex(8)}.safetensors"
    saved.state.save(folder / state_file)
    write_json(
        folder / MESSAGES_FILE,
        {
            "format": FILE_FORMAT,
            "messages": saved.messages,
            "state": state_file,
            "num_tokens": saved.state.num_tokens,
            "unread": list(saved.unread),
            "answered": saved.answered,
        },
    )
    for old in folder.glob("state-*.safetensors"):
        if old.name != state_file:
            old.unlink(missing_ok=True)


def load_conversation(folder: Path, model: LanguageModel) -> SavedConversation:
    """Read what `save_conversation` wrote.

    Raises:
        StateError: there is none, it is damaged, or it belongs to another model.
    """
    path = folder / MESSAGES_FILE
    values = read_json(path, "saved conversation", StateError)
    match values:
        case {
            "format": str(form),
            "messages": list(messages),
            "state": str(state_file),
            "num_tokens": int(num_tokens),
            "unread": list(unread),
            "answered": bool(answered),
        } if (
            form == FILE_FORMAT
            and len(values) == 6
            and all(_is_message(message) for message in messages)
            # A name and no path: a save must not make us read elsewhere.
            and re.fullmatch(r"state-[0-9a-f]+\.safetensors", state_file)
            and len(unread) <= 1
            and all(type(token) is int for token in unread)
            and all(0 <= token < model.config.vocab_size for token in unread)
            and (not answered or (messages and messages[-1]["role"] == "assistant"))
        ):
            pass
        case _:
            raise StateError(
                f"{str(path)!r} is not a saved conversation of this model: expected what /save "
                f"writes ({FILE_FORMAT})"
            )
    from jamba_lm.language_model import load_state

    state = load_state(folder / state_file, model)
    if state.num_tokens != num_tokens:
        raise StateError(
            f"{str(folder)!r} is mixed up: its state has read {state.num_tokens} tokens, its "
            f"messages say {num_tokens}; save the conversation again"
        )
    return SavedConversation(
        messages=messages, state=state, unread=tuple(unread), answered=answered
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in ("system", "user", "assistant")
        and isinstance(value["content"], str)
    )
