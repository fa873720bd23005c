"""`jamba generate`: continue a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

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
    open_readable,
)
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
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    choose_sampling,
)

STATUS_INTERRUPTED = 130


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The text to continue; an empty one starts from nothing.", show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A UTF-8 file with the text to continue. Without this and --prompt, standard "
            "input is read.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the prompt to the model as a user, by its chat template."),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="With --chat, what the model is told before.", show_default=False),
    ] = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = None,
    frequency_penalty: FrequencyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    draft: DraftOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --json, tell the log-probability of every token, and of the N likeliest.",
            show_default=False,
        ),
    ] = None,
    echo: Annotated[
        bool, typer.Option("--echo", help="Print the prompt in front of the text.")
    ] = False,
    prefill_tokens: PrefillOption = DEFAULT_PREFILL_TOKENS,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = None,
    json_wanted: JsonOption = False,
) -> None:
    """Continue a text, printing it as it is generated.

    The text goes to stdout; the layers of the model (A attention, m Mamba, * experts) and the
    timings go to stderr.
    """
    from jamba_lm.cli.answer import Answer
    from jamba_lm.cli.output import Output
    from jamba_lm.cli.prompt import read_prompt
    from jamba_lm.errors import InputError
    from jamba_lm.generation import generate as generate_tokens
    from jamba_lm.model.layout import draw_layers
    from jamba_lm.text.tokenizer import load_tokenizer

    if logprobs is not None and not json_wanted:
        raise InputError("--logprobs needs --json, which has the room for them")
    if system is not None and not chat:
        raise InputError("--system needs --chat: without it there is only a text to continue")
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
    text = read_prompt(prompt, prompt_file)
    output = Output(json_wanted)

    started = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    language_model = open_readable(model, dtype, backend, threads, quantize, adapter)
    load_seconds = time.perf_counter() - started
    note_slow_type(output, language_model, backend)
    said = [{"role": "user", "content": text}]
    if system is not None:
        said.insert(0, {"role": "system", "content": system})
    prompt_ids = tokenizer.chat_ids(said) if chat else tokenizer.encode(text)
    if not prompt_ids:
        if tokenizer.bos_id is None:
            raise InputError("the prompt is empty, and this tokenizer has no BOS to start from")
        prompt_ids = [tokenizer.bos_id]
    layers = draw_layers(language_model.config)
    answer = Answer(len(prompt_ids))
    with output.progress("reading", len(prompt_ids), "tokens") as progress:
        tokens = generate_tokens(
            language_model,
            prompt_ids,
            max_new_tokens=max_tokens,
            sampling=chosen.sampling,
            stop_ids=tokenizer.eos_ids,
            stop_strings=stop or (),
            num_logprobs=logprobs,
            draft=draft,
            tokenizer=tokenizer,
            prefill_tokens=prefill_tokens,
            on_prefill=lambda done, _: progress.update(done),
        )
        output.note(layers)
        if echo:
            output.write(text)
        try:
            answer.stream(tokens, output)
        except KeyboardInterrupt:
            # What was written is the answer then; the exit status tells that it was cut short.
            progress.clear()
    output.end_line()
    output.note(f"{answer.timing_line()}, seed {chosen.sampling.seed}")
    output.result(
        {
            "model": model,
            "layers": layers,
            "prompt": text,
            "messages": said if chat else None,
            "prompt_ids": prompt_ids,
            "seed": chosen.sampling.seed,
            "sampling": chosen.values(),
            "load_seconds": load_seconds,
            **answer.values(),
        }
    )
    if answer.finish_reason == "interrupted":
        raise typer.Exit(STATUS_INTERRUPTED)
