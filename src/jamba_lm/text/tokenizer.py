"""Text <-> token ids, for any checkpoint folder; ids are all that the rest of the project sees.

A text is only text: a control token such as <|im_end|> inside it is spelled out in ordinary
tokens, unless the caller says otherwise. Knows nothing about models.

Paper: Jamba §3 (tokenizer); the model card asks for <|startoftext|> in front of every text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from jamba_lm.errors import InputError, TokenizerError
from jamba_lm.files import path_kind
from jamba_lm.gguf_file import is_gguf
from jamba_lm.text.answers import ChatPart, answer_spans
from jamba_lm.text.chat_rendering import Rendering, prepare
from jamba_lm.text.chat_template import (
    ChatTemplate,
    Message,
    check_messages,
    compile_templates,
    plain_data,
    template_sources,
)
from jamba_lm.text.control_tokens import TAG, AddedTokenFinder
from jamba_lm.text.decoding import TextStream as TextStream
from jamba_lm.text.gguf_tokenizer import open_documents
from jamba_lm.text.special_tokens import (
    GENERATION,
    MODEL,
    SETTINGS,
    SpecialTokens,
    find_special_tokens,
    read_special_tokens,
)
from jamba_lm.text.tokenizer_file import (
    AddedToken,
    TokenizerFile,
    library_errors,
    read_tokenizer_file,
    understand,
)

logger = logging.getLogger(__name__)

CONTRADICTIONS_LOGGED = 5


class Tokenizer:
    """One checkpoint's tokenizer.

    Attributes:
        vocab_size: the highest id plus one; a model may have more rows.
        bos_id: put in front of every text, as the model card asks; None when there is no such
            token.
        eos_ids: every id that ends a text or a turn, from all files of the folder, ascending.
        pad_id: the filler token, or None.
        add_bos: whether `encode` puts the BOS there when not told.
        chat_template: how a conversation is written, or None.
        contradictions: what the files of the folder disagree about, a sentence each.
    """

    def __init__(
        self, file: TokenizerFile, special: SpecialTokens, chat_template: ChatTemplate | None
    ) -> None:
        self._file = file
        self._names = {index: name for name, index in file.names.items()}
        self.vocab_size = max(file.bytes_by_id) + 1
        self.bos_id = special.bos_id
        self.eos_ids = special.eos_ids
        self.pad_id = special.pad_id
        self.add_bos = special.add_bos
        self.contradictions = special.contradictions
        self.chat_template = chat_template

        added = file.added.values()
        self.special_ids = frozenset(token.id for token in added if token.special)
        controls = [token for token in added if token.control]
        # The model itself writes the unknown token, for what the vocabulary cannot spell.
        self._control_ids = {token.id for token in controls} - {file.unknown_id}
        self._controls = AddedTokenFinder(controls)
        self._every_added = AddedTokenFinder(added)
        self._plain_added = AddedTokenFinder(token for token in added if not token.control)
        sequence_tokens = frozenset(special.names.values())
        # What a model writes itself, and templates look for in its answers.
        self._answer_markup = frozenset(
            token.content
            for token in controls
            if TAG.fullmatch(token.content) and token.content not in sequence_tokens
        )

    def encode(
        self, text: str, *, add_bos: bool | None = None, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: any text; nothing is changed or lost unless the tokenizer's own file says so.
            add_bos: put the BOS in front, unless it is there already; as the files say when None,
                which is yes for Jamba.
            allow_special: let the names of control tokens in the text, such as <|im_end|>, become
                these tokens. Leave it off for text that somebody else wrote: with it, a text can
                end its own message and speak for the system.

        Raises:
            InputError: the text holds half a surrogate pair.
            TokenizerError: a BOS is asked for and there is none, or the library fails.
        """
        _check_characters(text)
        finder = self._every_added if allow_special else self._plain_added
        return self._with_bos(self._ids(finder, text), add_bos)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids; one that the vocabulary lacks becomes U+FFFD, too.
            skip_special: leave out BOS, EOS and the like.

        Raises:
            InputError: an id is negative.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Return a text that grows token by token; see `TextStream`."""
        skipped = self.special_ids if skip_special else frozenset()
        return TextStream(self._file.decoding, self._names, self._file.bytes_by_id, skipped)

    def token_name(self, token_id: int) -> str | None:
        """Return how tokenizer.json names a token, or None for an id without one."""
        return self._names.get(token_id)

    def token_id(self, name: str) -> int | None:
        """Return the id of the token of this name, or None."""
        return self._file.names.get(name)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes that a token writes, or None for an id without a token."""
        return self._file.bytes_by_id.get(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> str:
        """Return the text of a conversation, for reading.

        For a model use `chat_ids`: in this text, what the template wrote and what a message
        contains can no longer be told apart.

        Args:
            messages: objects with a `role` and a `content`, as in OpenAI's interface.
            add_generation_prompt: end where the assistant's answer starts.
            tools: JSON schemas of what the model may call.
            variables: more variables for the template.
            now: the clock for templates that write the date.

        Raises:
            InputError: the messages are malformed, or the template refuses them.
            TokenizerError: there is no template, or it fails or exceeds its bounds.
        """
        return self._template().render(
            check_messages(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else plain_data(list(tools), "tools"),
            variables=plain_data(dict(variables or {}), "template variables"),
            now=now,
        )

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        add_bos: bool | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> list[int]:
        """Return the ids of a conversation, in which only the template makes control tokens.

        The names of control tokens inside messages, tools and variables are marked before the
        template runs, so that they are told apart from what the template writes, and are then
        spelled out in ordinary tokens. An answer of the assistant may hold its own markup, such
        as <think>.

        Args:
            messages: as for `apply_chat_template`.
            add_bos: as for `encode`; never doubles a BOS that the template wrote.
            add_generation_prompt: as for `apply_chat_template`.
            tools: as for `apply_chat_template`.
            variables: as for `apply_chat_template`.
            now: as for `apply_chat_template`.

        Raises:
            InputError: the messages are malformed, or the template refuses them.
            TokenizerError: there is no template, or it fails or exceeds its bounds.
        """
        rendering = self._rendering(messages, tools, variables, now)
        text = rendering.text(len(messages), add_generation_prompt)
        _check_characters(text)
        return self._with_bos(self._ids(self._every_added, text, rendering.mark), add_bos)

    def chat_parts(
        self,
        messages: Sequence[Message],
        *,
        last_only: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> list[ChatPart]:
        """Return the ids of a conversation to learn from, cut where answers start and end.

        Each part is tokenized apart, as it is when a model is asked: the prompt first, and then
        what it writes. So it is exactly known which tokens are answers, also where white space of
        both sides would have become one token.

        Arguments and errors are those of `chat_ids`, and: with `last_only` only the last answer is
        to be learned; a TokenizerError also says that answers cannot be told from the rest.
        """
        rendering = self._rendering(messages, tools, variables, now)
        whole = rendering.text(len(messages), False)
        _check_characters(whole)
        roles = [str(message["role"]) for message in messages]

        def ids(start: int, end: int) -> list[int]:
            text = whole[start:end]
            return self._ids(self._every_added, text, rendering.mark, inside=start > 0)

        parts, done = [], 0
        for start, end in answer_spans(whole, roles, rendering.text, last_only=last_only):
            before, answer = ids(done, start), ids(start, end)
            parts.append(ChatPart(before if done else self._with_bos(before, None), 0))
            # White space behind the token that ends a turn is the template's, not the model's.
            ends = [at for at, one in enumerate(answer, 1) if one in self._control_ids]
            parts.append(ChatPart(answer, ends[-1] if ends else len(answer)))
            done = end
        return [part for part in [*parts, ChatPart(ids(done, len(whole)), 0)] if part.ids]

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that follow one another, no token reaching from one to the next.

        The first has the BOS in front, if the tokenizer puts one there. See `encode`.
        """
        ids = []
        for number, text in enumerate(texts):
            _check_characters(text)
            ids.append(self._ids(self._plain_added, text, inside=number > 0))
        return [self._with_bos(ids[0], None), *ids[1:]]

    def _rendering(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        now: Callable[[], datetime],
    ) -> Rendering:
        return prepare(
            self._template(),
            messages,
            tools=tools,
            variables=variables,
            now=now,
            controls=self._controls,
            answer_markup=self._answer_markup,
        )

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: give the prompt as a text, or put a "
                "chat_template.jinja beside tokenizer.json"
            )
        return self.chat_template

    def _with_bos(self, ids: list[int], add_bos: bool | None) -> list[int]:
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise TokenizerError(
                "this tokenizer has no BOS to put in front of the text: encode with add_bos=False"
            )
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _ids(
        self, finder: AddedTokenFinder, text: str, mark: str = "", *, inside: bool = False
    ) -> list[int]:
        """Return the ids of `text`; `mark` is taken out once the added tokens are found.

        `inside` says that other text stands before it.
        """
        ids: list[int] = []
        for place, piece in finder.split(text):
            if isinstance(piece, AddedToken):
                ids.append(piece.id)
                continue
            piece = piece.replace(mark, "") if mark else piece
            library = self._file.inside if place or inside else self._file.start
            with library_errors("encode the text"):
                spelled = library.encode(piece, add_special_tokens=False).ids
            ids += spelled if self._control_ids.isdisjoint(spelled) else self._respelled(spelled)
        return ids

    def _respelled(self, ids: Sequence[int]) -> list[int]:
        """Replace control tokens, which merges made of ordinary text, by their characters."""
        respelled: list[int] = []
        for one in ids:
            if one not in self._control_ids:
                respelled.append(one)
                continue
            for character in self._names[one]:
                with library_errors("encode the text"):
                    spelled = self._file.inside.encode(character, add_special_tokens=False).ids
                respelled += spelled
        if not self._control_ids.isdisjoint(respelled):
            raise TokenizerError(
                "the vocabulary makes a control token of a single character; it cannot be used on "
                "text that is not trusted"
            )
        return respelled


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds half a surrogate pair (U+{ord(text[error.start]):04X} at character "
            f"{error.start:,}), which is no character: was it read with the right encoding?"
        ) from error


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder, of a GGUF file, or a tokenizer.json.

    Reads tokenizer.json, and as far as they are there tokenizer_config.json,
    generation_config.json, config.json and chat_template.jinja beside it.

    Raises:
        TokenizerError: a file is missing, malformed, or uses what is not supported.
        CheckpointError: a GGUF file is damaged.
    """
    given = Path(path)
    if is_gguf(given):
        return _load_from_gguf(given)
    json_path = (
        given
        if given.suffix == ".json" and path_kind(given) != "folder"
        else given / "tokenizer.json"
    )
    if path_kind(json_path) != "file":
        raise TokenizerError(
            f"no tokenizer at {str(path)!r}: expected a tokenizer.json, or a folder that holds one"
        )
    folder = json_path.parent
    file = read_tokenizer_file(json_path)
    try:
        special = read_special_tokens(folder, file)
        template = compile_templates(template_sources(folder, special.settings), special.names)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer in {str(folder)!r}: {error}") from error
    _log_contradictions(folder, special.contradictions)
    return Tokenizer(file, special, template)


def _load_from_gguf(path: Path) -> Tokenizer:
    documents = open_documents(path)
    contents = {SETTINGS: documents.settings, GENERATION: documents.generation, MODEL: {}}
    try:
        file = understand(documents.tokenizer)
        special = find_special_tokens(contents, file)
        template = compile_templates(documents.templates, special.names)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer in {str(path)!r}: {error}") from error
    _log_contradictions(path, special.contradictions)
    return Tokenizer(file, special, template)


def _log_contradictions(path: Path, contradictions: Sequence[str]) -> None:
    for note in contradictions[:CONTRADICTIONS_LOGGED]:
        logger.warning("tokenizer in %s: %s", path, note)
    left_out = len(contradictions) - CONTRADICTIONS_LOGGED
    if left_out > 0:
        logger.warning("tokenizer in %s: %d more contradictions", path, left_out)
