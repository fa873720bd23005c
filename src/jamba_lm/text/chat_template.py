"""Turns a conversation into the text that a model was tuned on, by the checkpoint's own template.

A message must not be able to end itself and start another one in someone else's name: see
`guard`. Knows nothing about token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jamba_lm.errors import InputError, TokenizerError
from jamba_lm.files import path_kind
from jamba_lm.text.template_sandbox import SOURCE_LIMIT_CHARACTERS, BoundedTemplate

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
NESTING_LIMIT = 32

# Written into tokenizers that this project trains: ChatML, with the BOS that Jamba wants.
CHATML_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat templates of one tokenizer.

    Attributes:
        programs: compiled templates by name; "default" is used unless there is a "tool_use" one
            and tools were given.
        names: bos_token, eos_token and the like, which templates write.
    """

    programs: Mapping[str, BoundedTemplate]
    names: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: checked messages, see `check_messages`.
            add_generation_prompt: end where the assistant's answer starts.
            tools: what the model may call, as JSON schemas, made of plain data.
            variables: more variables for the template, made of plain data.
            now: the clock that a template with a date in it reads.

        Raises:
            InputError: the template refuses the messages, or a variable is not to be given.
            TokenizerError: there is no template, or it fails.
        """
        name = "tool_use" if tools and "tool_use" in self.programs else "default"
        if name not in self.programs:
            known = ", ".join(self.programs) or "none"
            raise TokenizerError(
                f"this tokenizer has no default chat template (it has: {known}): give the prompt "
                "as a text, or add chat_template.jinja beside tokenizer.json"
            )
        values: dict[str, Any] = {"documents": None, **self.names}
        own = {
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        for key in variables or {}:
            if key in own or key in self.names:
                raise InputError(f"the template variable {key!r} is set by other means")
        values |= {**(variables or {}), **own}
        return self.programs[name].run(values, now)


def template_sources(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Find the chat templates of a folder: chat_template.jinja, or else tokenizer_config.json.

    Raises:
        TokenizerError: one is unreadable, or not a text.
    """
    sources: dict[str, str] = {}
    value = settings.get("chat_template")
    if isinstance(value, str):
        sources["default"] = value
    elif isinstance(value, list):
        for entry in value:
            match entry:
                case {"name": str(name), "template": str(source)}:
                    sources[name] = source
                case _:
                    raise TokenizerError(
                        f"tokenizer_config.json: chat_template holds {entry!r:.80}, expected "
                        "objects with a name and a template"
                    )
    elif value is not None:
        raise TokenizerError(
            f"tokenizer_config.json: chat_template is {value!r:.80}, expected a text or a list"
        )
    paths = {"default": folder / "chat_template.jinja"}
    if path_kind(folder / "additional_chat_templates") == "folder":
        paths |= {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in paths.items():
        if path_kind(path) != "missing":
            sources[name] = _read_source(path)
    return sources


def compile_templates(sources: Mapping[str, str], names: Mapping[str, str]) -> ChatTemplate | None:
    """Make the chat templates of these texts; None when there are none.

    Raises:
        TokenizerError: a template is malformed.
    """
    if not sources:
        return None
    return ChatTemplate({n: BoundedTemplate.compile(s) for n, s in sources.items()}, names)


def _read_source(path: Path) -> str:
    if path_kind(path) != "file":
        raise TokenizerError(f"chat template {str(path)!r} is not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(4 * SOURCE_LIMIT_CHARACTERS + 1)
        return data.decode("utf-8")
    except OSError as error:
        raise TokenizerError(
            f"cannot read chat template {str(path)!r}: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"chat template {str(path)!r} is not UTF-8 at byte {error.start}"
        ) from error


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return plain copies of `messages`, with contents in parts joined to one text.

    Raises:
        InputError: there are none, or one has no known role or a content that is no text; the
            message says which.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            f"messages are {messages!r:.80}, expected a list of objects with a role and a content"
        )
    if not messages:
        raise InputError("no messages: a conversation has one or more")
    return [_checked(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _checked(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {message!r:.80}, expected an object with role and content")
    plain = plain_data(message, where)
    role, content = plain.get("role"), plain.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role is {role!r:.80}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        for part in content:
            match part:
                case {"type": "text", "text": str()}:
                    pass
                case _:
                    raise InputError(
                        f"{where}: content has the part {part!r:.80}, expected only "
                        '{"type": "text", "text": ...}: Jamba reads text'
                    )
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None and role == "assistant" and plain.get("tool_calls"):
        plain["content"] = None
    elif not isinstance(content, str):
        raise InputError(f"{where}: content is {content!r:.80}, expected a text")
    calls = plain.get("tool_calls")
    if calls is not None:
        _check_tool_calls(calls, where)
    return plain


def _check_tool_calls(calls: Any, where: str) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        match function:
            case {"name": str(), "arguments": str() | dict()}:
                pass
            case _:
                raise InputError(
                    f"{where}: tool_calls holds {call!r:.80}, expected a list of objects whose "
                    "function has a name and arguments (an object, or its JSON)"
                )


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy of `value` made of plain JSON types only.

    Raises:
        InputError: it holds anything else, is nested too deeply, or half a surrogate pair.
    """
    if depth > NESTING_LIMIT:
        raise InputError(f"{where} is nested more than {NESTING_LIMIT} deep")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} holds half a surrogate pair (U+{ord(text[error.start]):04X} at character "
                f"{error.start:,}), which is no character"
            ) from error
        return text
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} holds the key {key!r:.80}, expected a text")
        return {
            plain_data(key, where, depth + 1): plain_data(one, where, depth + 1)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_data(one, where, depth + 1) for one in value]
    raise InputError(
        f"{where} holds a {type(value).__name__}, expected text, numbers, lists, objects"
    )
