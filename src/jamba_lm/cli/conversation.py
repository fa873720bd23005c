"""A conversation with a model: what was said, and the state that has read it.

Each turn reads only what is new. The model's own tokens are never read again from their text: the
state has them already, and text may fall into other tokens than those it was made of. Only when a
chat template rewrites what was said before (some drop earlier thoughts) is a part read again, from
the last point before it.

Does not know terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jamba_lm.cli.saved_conversation import (
    SavedConversation,
    load_conversation,
    save_conversation,
)
from jamba_lm.cli.script import ChatScript, Message, PlainScript, Script
from jamba_lm.errors import InputError
from jamba_lm.generation import (
    PREFILL_TOKENS,
    GeneratedToken,
    ReportProgress,
    generate,
    read_ids,
)
from jamba_lm.model.sequence_memory import SequenceMemory
from jamba_lm.readable_model import ReadableModel
from jamba_lm.sampling import Sampling
from jamba_lm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jamba_lm.language_model import LanguageModel
    from jamba_lm.model.state import SequenceState

# Points to which /undo, or a rewriting template, can go back without reading anything again. Each
# costs as much memory as the states of the Mamba layers: 9 to 75 MiB in the published models.
MAX_POINTS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a conversation, and the state there.

    Attributes:
        state: what had been read; nobody moves it, whoever goes on from here takes a fork.
        asked: the script up to the last answer.
        said: the last answer, as far as it went; None before there is any.
        unread: ids of it that the state has not read.
    """

    state: SequenceMemory[Any]
    asked: Any
    said: str | None
    unread: tuple[int, ...]


class Conversation:
    """Messages, and a state that has read them.

    Attributes:
        messages: what was said, as chat templates take it: role and content.
        num_read: tokens that the last turn gave the model to read before it answered.
    """

    def __init__(
        self,
        model: ReadableModel,
        tokenizer: Tokenizer,
        *,
        reopen: Callable[[], LanguageModel] | None = None,
        system: str | None = None,
        draft: str | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """Begin a conversation in which nothing was said, but for the system message if any.

        Args:
            model: answers.
            tokenizer: that of the model.
            reopen: opens the same model as one whose states are saved and loaded; None where
                `model` is such a one.
            system: the system message, or None.
            draft: how answers are drafted, as in `generation.Request`.
            prefill_tokens: how much is read at once.

        Raises:
            InputError: a system message was given to a model without a chat template.
        """
        self.has_template = tokenizer.chat_template is not None
        if system is not None and not self.has_template:
            raise InputError(
                "this model has no chat template, so it knows no system message: leave it out"
            )
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.num_read = 0
        self._model = model
        self._reopen = reopen
        self._tokenizer = tokenizer
        self._draft = draft
        self._prefill_tokens = prefill_tokens
        self._script: Script = (
            ChatScript(tokenizer) if self.has_template else PlainScript(tokenizer)
        )
        self._points: list[Point] = []
        self._before_answer: Point | None = None
        self._state = model.new_state()
        self._asked = self._script.nothing()
        self._said: str | None = None
        self._unread: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the state has read."""
        return self._state.num_tokens

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        on_prefill: ReportProgress | None = None,
    ) -> Iterator[GeneratedToken]:
        """Say something: read it now, and return the answer, to be taken token by token.

        When reading is stopped by an exception, the question counts as not asked. When the answer
        is not taken to its end, what was taken of it counts.

        Args:
            question: what the user says.
            max_new_tokens: length of the answer at most.
            sampling: how its tokens are picked.
            on_prefill: called after each piece read, with the tokens read and to be read.

        Raises:
            InputError: there is nothing to read, or the template refuses the messages.
        """
        before = self._here()
        points = self._points
        self.messages.append({"role": "user", "content": question})
        try:
            ids = self._go_to(self._script.whole(self.messages))
            if not ids:
                raise InputError("there is nothing to read: say something")
            if ids[:-1]:
                read_ids(
                    self._model,
                    ids[:-1],
                    self._state,
                    prefill_tokens=self._prefill_tokens,
                    on_prefill=on_prefill,
                )
        except BaseException:
            self.messages.pop()
            self._points = points
            self._return_to(before)
            raise
        self.num_read = len(ids)
        self._points = [*self._points, before][-MAX_POINTS:]
        self._unread = (ids[-1],)
        self._before_answer = self._here()
        return self._answer(max_new_tokens, sampling)

    def retry(self, *, max_new_tokens: int, sampling: Sampling) -> Iterator[GeneratedToken]:
        """Take back the last answer, and return another one. Only the last token is read again.

        Raises:
            InputError: nothing was asked since the conversation began or was loaded.
        """
        if self._before_answer is None:
            raise InputError("there is no answer to try again: ask something first")
        self._return_to(self._before_answer)
        self._drop_answer()
        self.num_read = len(self._unread)
        return self._answer(max_new_tokens, sampling)

    def undo(self) -> str:
        """Take back the last question and its answer, and return the question.

        Raises:
            InputError: nothing was asked.
        """
        if not any(message["role"] == "user" for message in self.messages):
            raise InputError("there is nothing to undo: ask something first")
        self._drop_answer()
        question = self.messages.pop()["content"]
        self._before_answer = None
        if self._points:
            self._return_to(self._points.pop())
        else:
            # Far back, or loaded: the next turn reads what is left of the conversation again.
            self._state, self._asked = self._model.new_state(), self._script.nothing()
            self._said, self._unread = None, ()
        return question

    def _drop_answer(self) -> None:
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()

    def _answer(self, max_new_tokens: int, sampling: Sampling) -> Iterator[GeneratedToken]:
        tokens = generate(
            self._model,
            self._unread,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self._tokenizer.eos_ids,
            state=self._state,
            draft=self._draft,
            tokenizer=self._tokenizer,
        )
        return self._heard(tokens)

    def _heard(self, tokens: Iterator[GeneratedToken]) -> Iterator[GeneratedToken]:
        answer = {"role": "assistant", "content": ""}
        whole = [*self._state.ids, *self._unread]
        for token in tokens:
            if self._said is None:
                self._said = ""
                self.messages.append(answer)
            self._said += token.text
            answer["content"] = self._said
            # What ends an answer is written by the template, in front of the next question.
            if token.finish_reason != "stop_id":
                whole.append(token.id)
            # One token as a rule. With drafts the state may lag behind what was given out.
            self._unread = tuple(whole[self._state.num_tokens :])
            yield token

    def _here(self) -> Point:
        return Point(self._state.fork(), self._asked, self._said, self._unread)

    def _return_to(self, point: Point) -> None:
        self._state = point.state.fork()
        self._asked, self._said, self._unread = point.asked, point.said, point.unread

    def _go_to(self, whole: Any) -> list[int]:
        """Take the state to the last point that `whole` goes on from; return what is unread.

        A template that drops the thoughts from an answer once the next question is there is gone on
        with from before that answer.
        """
        start = Point(self._model.new_state(), self._script.nothing(), None, ())
        asked = [] if self._before_answer is None else [self._before_answer]
        for point in (self._here(), *asked, *reversed(self._points), start):
            rest = self._script.rest(whole, point.asked, point.said)
            if rest is not None:
                self._return_to(point)
                self._asked, self._said = whole, None
                return [*point.unread, *rest]
        raise AssertionError("every script begins with the empty one")

    def save(self, folder: Path) -> None:
        """Write messages and state into `folder`, which may hold an older save.

        Raises:
            InputError: the folder cannot be written.
        """
        if self._unread[:-1]:
            # The answer was stopped within a draft. A kept state lacks one token at most.
            read_ids(self._model, self._unread[:-1], self._state)
            self._unread = self._unread[-1:]
        save_conversation(
            folder,
            SavedConversation(
                messages=self.messages,
                state=self._state_to_save(),
                unread=self._unread,
                answered=self._said is not None,
            ),
        )

    def load(self, folder: Path) -> None:
        """Take over the conversation that `save` wrote; after an error this one goes on.

        Raises:
            StateError: there is none, it is damaged, or it belongs to another model.
        """
        model = self._with_files()
        saved = load_conversation(folder, model)
        asked = saved.messages[:-1] if saved.answered else saved.messages
        self._asked = (
            self._script.whole(asked) if saved.state.num_tokens else self._script.nothing()
        )
        self._said = saved.messages[-1]["content"] if saved.answered else None
        self.messages, self._state, self._unread = saved.messages, saved.state, saved.unread
        self._points, self._before_answer = [], None
        # Nothing is left that another model remembers.
        self._model = model

    def _with_files(self) -> LanguageModel:
        from jamba_lm.language_model import LanguageModel

        if isinstance(self._model, LanguageModel):
            return self._model
        assert self._reopen is not None
        return self._reopen()

    def _state_to_save(self) -> SequenceState:
        from jamba_lm.model.state import SequenceState

        if isinstance(self._state, SequenceState):
            return self._state
        state = self._with_files().new_state()
        state.read_arrays(self._state)
        return state
