"""`jamba generate`: continue a text."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jamba_lm.cli.options import (
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    model_folder,
    open_model,
)
from jamba_lm.cli.sampling_options import (
    DEFAULT_PREFILL_TOKENS,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
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
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = DEFAULT_TEMPERATURE,
    top_k: TopKOption = None,
    top_p: TopPOption = DEFAULT_TOP_P,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionOption = 1.0,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
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
    from jamba_lm.sampling import Sampling, fresh_seed
    from jamba_lm.text.tokenizer import load_tokenizer

    if logprobs is not None and not json_wanted:
        raise InputError("--logprobs needs --json, which has the room for them")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    if sampling.seed is None:
        sampling = replace(sampling, seed=fresh_seed())
    text = read_prompt(prompt, prompt_file)
    output = Output(json_wanted)

    started = time.perf_counter()
    tokenizer = load_tokenizer(model_folder(model))
    language_model = open_model(model, dtype, backend, threads)
    load_seconds = time.perf_counter() - started
    prompt_ids = tokenizer.encode(text)
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
            sampling=sampling,
            stop_ids=tokenizer.eos_ids,
            stop_strings=stop or (),
            num_logprobs=logprobs,
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
    output.note(f"{answer.timing_line()}, seed {sampling.seed}")
    output.result(
        {
            "model": model,
            "layers": layers,
            "prompt": text,
            "prompt_ids": prompt_ids,
            "seed": sampling.seed,
            "load_seconds": load_seconds,
            **answer.values(),
        }
    )
    if answer.finish_reason == "interrupted":
        raise typer.Exit(STATUS_INTERRUPTED)
