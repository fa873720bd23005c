"""`jamba chat`: a conversation in a terminal, or line by line through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from jamba_lm.cli.options import (
    AdapterOption,
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
    model_folder,
    note_slow_type,
    open_model,
    open_readable,
)
from jamba_lm.cli.output import Output
from jamba_lm.cli.sampling_options import (
    DEFAULT_PREFILL_TOKENS,
    DraftOption,
    FrequencyOption,
    MaxTokensOption,
    MinPOption,
    PrefillOption,
    PresenceOption,
    RepetitionOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    choose_sampling,
)
from jamba_lm.errors import InputError, JambaError

if TYPE_CHECKING:
    from jamba_lm.cli.answer import Answer
    from jamba_lm.cli.conversation import Conversation
    from jamba_lm.generation import GeneratedToken
    from jamba_lm.sampling import Sampling

PROMPT = "> "
BLOCK = '"""'
LINE_LIMIT_BYTES = 64 * 1024**2
HELP = f"""\
/undo         take back the last question and its answer
/retry        another answer to the last question
/save FOLDER  keep the conversation: what was said, and the state that has read it
/load FOLDER  go on with a kept conversation; nothing is read again
/help         this list
/quit         leave (Ctrl-D does, too)
Ctrl-C stops an answer; what was said of it stays.
{BLOCK} opens a message of several lines, and ends it; // begins a message that starts with /."""


def chat(
    model: ModelArgument,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before you speak.", show_default=False),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Go on with a conversation that /save kept.", show_default=False
        ),
    ] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = None,
    frequency_penalty: FrequencyOption = None,
    seed: SeedOption = None,
    draft: DraftOption = None,
    prefill_tokens: PrefillOption = DEFAULT_PREFILL_TOKENS,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Talk with a model. Each turn reads only what is new; /help lists what you can do.

    Lines may be piped in. A model without a chat template continues your text.
    """
    from jamba_lm.cli.conversation import Conversation
    from jamba_lm.model.layout import draw_layers
    from jamba_lm.text.tokenizer import load_tokenizer

    folder = model_folder(model)
    chosen = choose_sampling(
        folder,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    if load is not None and system is not None:
        raise InputError("--load and --system are both given: a kept conversation has its own")
    output = Output(json_wanted)
    tokenizer = load_tokenizer(folder)
    wishes = (model, dtype, backend, threads, quantize, adapter)
    language_model = open_readable(*wishes)
    note_slow_type(output, language_model, backend)
    conversation = Conversation(
        language_model,
        tokenizer,
        reopen=partial(open_model, *wishes),
        system=system,
        draft=draft,
        prefill_tokens=prefill_tokens,
    )
    output.note(draw_layers(language_model.config))
    if not conversation.has_template:
        output.note(
            "This model has no chat template: it only continues texts. What you type is put on a "
            "new line, and the model goes on from there."
        )
    session = Session(conversation, output, chosen.sampling, max_tokens)
    if load is not None:
        session.load(str(load))
    if sys.stdin.isatty():
        output.note("/help lists what you can do.")
    session.run(messages(output))
    output.result(
        {
            "model": model,
            "has_chat_template": conversation.has_template,
            "seed": chosen.sampling.seed,
            "sampling": chosen.values(),
            "messages": conversation.messages,
            "answers": [answer.values() for answer in session.answers],
        }
    )


@dataclass(slots=True)
class Session:
    """One run of the program: what is typed, and what is done about it."""

    conversation: Conversation
    output: Output
    sampling: Sampling
    max_tokens: int
    answers: list[Answer] = field(default_factory=list)

    def run(self, lines: Iterator[str]) -> None:
        """Take messages and commands until they end or one of them is /quit.

        Raises:
            JambaError: one failed, and nobody sits there to do something about it.
        """
        commands: dict[str, Callable[[str], None]] = {
            "/undo": self.undo,
            "/retry": self.retry,
            "/save": self.save,
            "/load": self.load,
            "/help": self.help,
        }
        for line in lines:
            name, _, argument = line.partition(" ")
            try:
                if name == "/quit":
                    return
                if name in commands:
                    commands[name](argument.strip())
                elif line.startswith("/") and not line.startswith("//"):
                    raise InputError(
                        f"no command {name}; /help lists them, and // begins a message with /"
                    )
                else:
                    self.ask(line.removeprefix("/"))
            except JambaError as error:
                if not sys.stdin.isatty():
                    raise
                self.output.note(f"error: {error}")

    def ask(self, question: str) -> None:
        """Say something, and print the answer."""
        from jamba_lm.cli.answer import Answer

        answer = Answer()
        with CtrlC() as pressed, self.output.progress("reading", 1, "tokens") as progress:

            def show(done: int, total: int) -> None:
                progress.update(done, total=total)
                if pressed():
                    raise KeyboardInterrupt

            try:
                tokens = self.conversation.ask(
                    question,
                    max_new_tokens=self.max_tokens,
                    sampling=self._next_sampling(),
                    on_prefill=show,
                )
            except KeyboardInterrupt:
                progress.clear()
                self.output.note("stopped while reading: this counts as not said")
                return
            self._print(answer, tokens, pressed)

    def retry(self, argument: str) -> None:
        """Print another answer to the last question."""
        from jamba_lm.cli.answer import Answer

        _require_none("/retry", argument)
        if self.sampling.temperature == 0:
            self.output.note("at --temperature 0 the answer is always the same")
        answer = Answer()
        with CtrlC() as pressed:
            tokens = self.conversation.retry(
                max_new_tokens=self.max_tokens, sampling=self._next_sampling()
            )
            self._print(answer, tokens, pressed)

    def undo(self, argument: str) -> None:
        """Take back the last question and its answer."""
        _require_none("/undo", argument)
        question = self.conversation.undo()
        first_line = question.splitlines()[0] if question else ""
        self.output.note(f"taken back: {first_line[:60]}")

    def save(self, argument: str) -> None:
        """Keep the conversation in a folder."""
        self.conversation.save(_require_folder("/save", argument))
        self.output.note(f"kept in {argument}")

    def load(self, argument: str) -> None:
        """Go on with a conversation that was kept."""
        self.conversation.load(_require_folder("/load", argument))
        self.output.note(
            f"{len(self.conversation.messages)} messages, "
            f"{self.conversation.num_tokens:,} tokens: nothing to read again"
        )

    def help(self, argument: str) -> None:
        """List the commands."""
        _require_none("/help", argument)
        self.output.note(HELP)

    def _next_sampling(self) -> Sampling:
        # Another answer needs other draws; together they still follow from the one seed.
        assert self.sampling.seed is not None
        seed = (self.sampling.seed + len(self.answers)) % 2**63
        return replace(self.sampling, seed=seed)

    def _print(
        self, answer: Answer, tokens: Iterator[GeneratedToken], pressed: Callable[[], bool]
    ) -> None:
        answer.num_prompt_tokens = self.conversation.num_read
        try:
            answer.stream(tokens, self.output, pressed)
        except KeyboardInterrupt:
            # The second one, which does not wait for the token that is being computed.
            self.conversation.undo()
            self.output.end_line()
            self.output.note("question and answer were dropped")
            return
        self.answers.append(answer)
        self.output.end_line()
        ending = {
            "length": f", stopped at {self.max_tokens} tokens",
            "interrupted": ", stopped by Ctrl-C",
        }.get(answer.finish_reason, "")
        self.output.note(f"[{answer.timing_line()}{ending}]")


class CtrlC:
    """While it is open, the first Ctrl-C is noted, and only the second one interrupts."""

    def __init__(self) -> None:
        self._times = 0
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._times += 1
        if self._times > 1:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        """Return whether it was pressed."""
        return self._times > 0


def messages(output: Output) -> Iterator[str]:
    """Yield what is typed or piped in: one line each, or a block between triple quotes.

    Raises:
        InputError: a line is not UTF-8.
    """
    while (line := _read_line(output)) is not None:
        if line.startswith(BLOCK):
            block = line.removeprefix(BLOCK)
            while not block.endswith(BLOCK) and (more := _read_line(output)) is not None:
                block += "\n" + more
            yield block.removesuffix(BLOCK).strip("\n")
        elif line.strip():
            yield line


def _read_line(output: Output) -> str | None:
    if not sys.stdin.isatty():
        data = sys.stdin.buffer.readline(LINE_LIMIT_BYTES)
        if not data:
            return None
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"a line of standard input is not UTF-8: byte {error.start} of it is "
                f"0x{data[error.start]:02x} ({error.reason})"
            ) from error
    import readline  # noqa: F401 - importing it gives input() its line editing

    for attempt in range(2):
        try:
            return input("" if output.json_wanted else PROMPT)
        except EOFError:
            output.note("")
            return None
        except KeyboardInterrupt:
            if attempt:
                raise
            output.note("\n/quit or Ctrl-D leaves, and so does another Ctrl-C")
    return None


def _require_none(command: str, argument: str) -> None:
    if argument:
        raise InputError(f"{command} takes nothing, but {argument!r} was given")


def _require_folder(command: str, argument: str) -> Path:
    if not argument:
        raise InputError(f"{command} needs a folder: {command} FOLDER")
    return Path(argument).expanduser()
